"""Microseconds of each kernel of replayed graphs and of generations, by torch's profiler."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile


def launches_of(calls, replays=20):
    """Microseconds a call in each kernel of captured calls, and in the gaps before them, by profiling replays."""

    with torch.no_grad():
        for call in calls:
            call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        graph.replay()
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            for _ in range(replays):
                graph.replay()
            torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type.name == "CUDA" and e.time_range.end > e.time_range.start]
    events.sort(key=lambda e: e.time_range.start)
    rows, gaps, last = {}, {}, None
    for event in events:
        key, span = event.name[:60], event.time_range
        rows.setdefault(key, []).append(span.end - span.start)
        if last is not None and span.start - last < 50:  # of one replay
            gaps.setdefault(key, []).append(max(0.0, span.start - last))
        last = span.end
    count = replays * len(calls)
    per_call = lambda table: {key: round(sum(each) / count, 2) for key, each in table.items()}  # noqa: E731
    return {"kernels": per_call(rows), "gaps before": per_call(gaps)}


def kernels_a_token(run):
    """Microseconds a token in each kernel of a generation, longest first, with its launches a token; and their sum."""

    tables = []
    for count in (32, 96):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            run(count)
        events = [each for each in found.key_averages() if each.device_type.name == "CUDA"]
        tables.append({each.key: (each.self_device_time_total, each.count) for each in events})
    rows = {
        key: [round((us - tables[0].get(key, (0, 0))[0]) / 64, 2), round((n - tables[0].get(key, (0, 0))[1]) / 64, 2)]
        for key, (us, n) in tables[1].items()
    }
    rows = dict(sorted(((key[:90], row) for key, row in rows.items() if row[0] > 0), key=lambda pair: -pair[1][0]))
    return {"sum": [round(sum(row[i] for row in rows.values()), 1) for i in range(2)], **dict(list(rows.items())[:40])}
