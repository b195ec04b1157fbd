"""The published page of a benchmark: tables per operator, with a mark where another contender was faster."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path

from ...runs.disk_errors import readable_disk_errors
from ...trust.figures import format_count, format_share
from .goals import Goal, find_decode_goal, find_goal, load_goals
from .results import OpResult, Results
from .roofline import is_above_floor, roofline, rows_above_floor

FILE, PLOT = "README.md", "roofline.png"
# A CPU has neither graphs nor launches, and a layer lies in its caches, which are faster than the floor.
ON_GPU_ONLY = ("eager us", "host us", "% of floor", "goal")


ABOVE = " †"
ABOVE_NOTE = (
    "†: faster than the floor, and above the lines of the roofline plot. The floor assumes that each call reads the "
    "weight from memory and computes at the rate of the large dense product. A weight that stays in a processor's "
    "caches between calls is read faster (those of a whole model do not fit there), and another shape, or a 2:4 sparse "
    "product, may be computed faster."
)


def publish(results: Results, directory: Path) -> list[Path]:
    """Write ``results.json``, the page and (if any row has a time) the plot; return the files."""
    with readable_disk_errors(directory, "the results"):
        written = [results.save(directory)]
        if any(row.graph_us for row in results.rows):
            written.append(roofline(results, directory / PLOT))
        page = directory / FILE
        page.write_text(render(results, plot=len(written) > 1), encoding="utf-8")
        return [*written, page]


def render(results: Results, plot: bool = False) -> str:
    """Return the page as Markdown; ``plot``: include the plot."""
    parts = ["# Kernel benchmarks", _environment(results)]
    if plot:
        parts.append(f"![Time against the roofline]({PLOT})")
    if results.rows:
        parts.append(f"{_verdict(results)} {_goal_count(results)}".strip())
    if results.decode:
        parts += ["## End to end", _decode_table(results)]
    if results.prefill:
        parts += ["## Prefill", _prefill_table(results)]
    for op, rows in groupby(results.rows, key=lambda row: row.op):
        parts.append(f"## {op}")
        for (N, K, dtype), group in groupby(rows, key=lambda row: (row.N, row.K, row.dtype)):
            parts += [f"### N={N}, K={K}, {dtype}", _op_table(list(group), results)]
    parts.append(_method(results))
    if results.left_out:
        parts.append("## Left out\n\nThe time limit was reached before: " + "; ".join(results.left_out) + ".")
    return "\n\n".join(parts) + "\n"


def faster_contenders(row: OpResult, results: Results) -> list[str]:
    """Return the dense product and peers that were faster than ``row`` by more than 2 % on the same problem.

    A peer counts only if it reads about as many bytes, or more.
    """
    if row.graph_us is None or row.role != "ours":
        return []
    rivals = [
        r for r in results.rows if r.problem_key == row.problem_key and r.role in ("dense", "peer") and r.graph_us
    ]
    others = [r for r in rivals if r.bytes > 0.9 * row.bytes]
    return [r.contender for r in others if (r.graph_us or 0) * 1.02 < row.graph_us]


def speedup_over_dense(row: OpResult, results: Results) -> float | None:
    """Return the time of the dense product over that of ``row``: in graphs if both were replayed, else eager."""
    dense = next((r for r in results.rows if r.problem_key == row.problem_key and r.role == "dense"), None)
    if dense is None:
        return None
    if dense.graph_us and row.graph_us:
        return dense.graph_us / row.graph_us
    return dense.eager_us / row.eager_us if dense.eager_us and row.eager_us else None


def on_cpu(results: Results) -> bool:
    """Return True if a CPU was timed."""
    return not results.driver and results.device.endswith(" threads")


def _verdict(results: Results) -> str:
    """Return in a sentence how many of our measurements lost to another contender, and how many failed."""
    ours = [row for row in results.rows if row.role == "ours"]
    lost = sum(bool(faster_contenders(row, results)) for row in ours)
    failed = sum(bool(row.failure) for row in ours)
    if ours and failed == len(ours):
        return f"All of hf_optim's {format_count(failed)} measurements failed: nothing is compared."
    text = (
        f"{format_count(lost) if lost else 'None'} of hf_optim's {format_count(len(ours))} measurements "
        f"{'were' if lost > 1 else 'was'} slower than the dense product or another library"
        f"{' (last column)' if lost else ''}"
    )
    return f"{text}; {format_count(failed)} failed." if failed else f"{text}."


def _op_table(rows: Sequence[OpResult], results: Results) -> str:
    return _columns([_cells(row, results) for row in rows], optional=("goal", "lost to"))


def _cells(row: OpResult, results: Results) -> dict[str, str]:
    name = f"**{row.contender}**" if row.role == "ours" else row.contender
    time = "us" if on_cpu(results) else "graph us"
    if row.failure:
        return {"M": str(row.M), "contender": name, time: f"failed: {row.failure}"}
    lost, goal = faster_contenders(row, results), find_goal(row, results)
    cells = {
        "M": str(row.M),
        "contender": name,
        time: _number(row.graph_us, ",.1f", "not capturable"),
        "spread": _share(row.spread),
        "eager us": _number(row.eager_us, ",.1f"),
        "host us": _number(row.host_us, ",.1f"),
        "% of floor": _share_of_floor(row.fraction_of_floor),
        "x dense": _number(speedup_over_dense(row, results), ".2f"),
        "error": _number(row.error, ".1e"),
        "goal": _goal_text(goal),
        "lost to": f"**{', '.join(lost)}**" if lost else "",
    }
    return {key: text for key, text in cells.items() if not (on_cpu(results) and key in ON_GPU_ONLY)}


def _decode_table(results: Results) -> str:
    rows = []
    for row in results.decode:
        of = {"model": row.model, "scheme": row.scheme, "cache": row.mode, "batch": str(row.batch)}
        if row.failure:
            rows.append({**of, "ms per token": f"failed: {row.failure}"})
            continue
        share = row.floor_ms / row.ms if row.floor_ms and row.ms and not on_cpu(results) else None
        numbers = {
            "ms per token": _number(row.ms, ",.2f"),
            "overall": _number(row.overall_ms, ",.2f"),
            "device busy": _number(row.gpu_ms, ",.2f"),
            "floor": "" if share is None else _number(row.floor_ms, ",.2f"),
            "of floor": _share_of_floor(share),
            "weights GB": _number(row.weights_gb, ".2f"),
            "peak GB": _number(row.peak_gb, ".2f"),
            "first ms": _number(row.first_ms, ",.1f"),
            "warm-up s": _number(row.warmup_s, ".1f"),
        }
        goal = "" if on_cpu(results) else _goal_text(find_decode_goal(row, results))
        rows.append({**of, **numbers, "goal": goal, "layers on": _kernels(row.kernels)})
    return _columns(rows, optional=("device busy", "floor", "of floor", "peak GB", "first ms", "goal", "layers on"))


def _kernels(labels: Mapping[str, int]) -> str:
    """Return on which kernels how many layers run: ``35 PyTorch int4 (CPU), 1 dense``."""
    counts: Counter[str] = Counter()
    for label, count in labels.items():
        counts[label.split(", ", 1)[0]] += count
    return ", ".join(f"{format_count(count)} {name}" for name, count in counts.most_common())


def _prefill_table(results: Results) -> str:
    rows = []
    for row in results.prefill:
        of = [str(row.batch), str(row.tokens)]
        if row.failure:
            rows.append([row.model, row.scheme, *of, f"failed: {row.failure}", *[""] * 3])
            continue
        same = (row.model, row.batch, row.tokens)
        dense = [r.ms for r in results.prefill if r.scheme == "dense" and (r.model, r.batch, r.tokens) == same and r.ms]
        ratio = dense[0] / row.ms if dense and row.ms else None
        rate = row.batch * row.tokens / row.ms * 1e3 if row.ms else None
        numbers = [
            _number(row.ms, ".2f"), _number(rate, ".0f"), _number(ratio, ".2f"), _number(row.peak_gb, ".2f")
        ]  # fmt: skip
        rows.append([row.model, row.scheme, *of, *numbers])
    header = ("model", "scheme", "batch", "tokens", "ms", "tokens per second", "x dense", "peak GB")
    return _table(header, rows)


def _columns(rows: Sequence[Mapping[str, str]], optional: Sequence[str] = ()) -> str:
    """Return a table of cells by column; an ``optional`` column that is empty in all rows is left out."""
    keys = max((list(row) for row in rows), key=len)
    shown = [key for key in keys if key not in optional or any(row.get(key) for row in rows)]
    return _table(shown, [[row.get(key, "") for key in shown] for row in rows])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines)


def _environment(results: Results) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    driver = f", driver {results.driver}" if results.driver else ""
    copy = results.ceilings["copy"] / 1e3
    rate = f"{copy / 1e3:.3g} TB/s" if copy >= 1e3 else f"{copy:.3g} GB/s"
    rates = ", ".join(f"{k} product {v / 1e6:.3g} TFLOP/s" for k, v in results.ceilings.items() if k != "copy")
    return (
        f"{results.device}{driver}; {results.date}; {versions}.\n\n"
        f"Ceilings measured in the same run: copy {rate}, {rates}.\n\n`{results.command}`"
    )


def _goal_count(results: Results) -> str:
    if on_cpu(results):
        return ""
    found = [goal for row in results.rows if (goal := find_goal(row, results))]
    met = sum(goal.met is True for goal in found)
    return f"Goals met: {met} of {len(found)} ({load_goals()['source']})." if found else ""


def _goal_text(goal: Goal | None) -> str:
    if goal is None:
        return ""
    verdict = {True: "met", False: "**missed**", None: "not measured"}[goal.met]
    return f"{goal.text}: {verdict}"


def _number(value: float | None, form: str, none: str = "") -> str:
    return none if value is None else format(value, form)


def _share(value: float | None) -> str:
    return "" if value is None else format_share(value, 0)


def _share_of_floor(share: float | None) -> str:
    """Return the floor over a time in percent, with a mark (explained below the tables) if the time is shorter."""
    return _share(share) + (ABOVE if is_above_floor(share) else "")


def _method(results: Results) -> str:
    if on_cpu(results):
        return (
            "## How this was measured\n\n"
            "`us` is the median wall-clock time of a call, on random data; `spread` is the distance from its 10th to "
            "its 90th percentile, over the median. `x dense` above 1 is faster than the dense product. `error` is the "
            "norm of the difference to float64 over its norm; that of a peer includes its quantization error. `lost "
            "to`: the contenders that were faster by more than 2 %. No roofline bound is given: a layer that "
            "lies in the caches of a CPU is read faster than a copy in memory."
        )
    graph = "CUDA graph that reads several copies of the weight, together three times the L2 cache, on random data"
    return (
        "## How this was measured\n\n"
        f"`graph us` is the median of 31 replays of a {graph}, over the number of copies; `spread` is the distance "
        "from its 10th to its 90th percentile, over the median. "
        "`eager us`: the host launches one call after the other. `host us`: the time until a call returns to the host. "
        "The floor is the roofline bound: the longer of the bytes that the format must read over the copy bandwidth "
        "(reads and writes counted) and the operations over the rate of a large product. `x dense` above 1 is faster "
        "than the dense product. `error` is the norm of the difference to float64 over its norm; that of a peer "
        "includes its quantization error. A goal is in microseconds on the GPU it was set on, and on others the same "
        "fraction of the floor. `lost to`: the contenders that were faster in a graph by more than 2 %."
        + (f"\n\n{ABOVE_NOTE}" if rows_above_floor(results) else "")
    )
