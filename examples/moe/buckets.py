"""Padding and time of ``dynamoe`` under even, skewed and drifting load, beside static capacities.

    python examples/moe/buckets.py --output model_cards/moe/buckets

Runs a trace of forwards through one mixture layer for each load. On a CPU it counts the rows of buffers, which do not
depend on the machine (half a minute). On a GPU it also times six ways to run the same forwards (a minute on an H200):
buckets that follow the load; the same from the start, with all captures; one static capacity with room for the busiest
expert of the whole trace; a static capacity factor of 1.25, which drops; and the product without buckets, called and
captured. Each forward of a drifting load is timed by itself, too: that shows where graphs are captured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import buckets_page
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_optim.toolkit.experts import Buckets, expert_product
from hf_optim.toolkit.experts.bucketed_layer import BucketedLayer, Graph, load_of
from hf_optim.toolkit.experts.buckets import CapacityWatch, bucket

SHAPES = {
    "Mixtral-8x7B": {"experts": 8, "top_k": 2, "hidden": 4096, "inner": 14336, "tokens": 512},
    "Qwen3-30B-A3B": {"experts": 128, "top_k": 8, "hidden": 2048, "inner": 768, "tokens": 512},
}
LOADS = ("even", "skewed", "drifting")
FORWARDS, WINDOW, PHASES = 96, 16, 6
STATIC = 1.25


class Experts(nn.Module):
    """Gated experts in the layout of transformers' interface, with random weights."""

    has_gate, has_bias, is_transposed, has_post_expert_norm = True, False, False, False

    def __init__(self, experts: int, hidden: int, inner: int, device: str, dtype: torch.dtype) -> None:
        super().__init__()
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_experts = experts
        self.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, hidden, **given) * hidden**-0.5, False)
        self.down_proj = nn.Parameter(torch.randn(experts, hidden, inner, **given) * inner**-0.5, False)

    def _apply_gate(self, rows: Tensor) -> Tensor:
        gate, up = rows.chunk(2, dim=-1)
        return F.silu(gate) * up


def trace(load: str, experts: int, top_k: int, tokens: int, seed: int = 0) -> list[Tensor]:
    """Return for each forward which experts its tokens choose, int64 ``[tokens, k]``.

    Skewed: expert e is chosen in proportion to 1 / (e + 1). Drifting: the same, and the order of experts is rotated in
    each of ``PHASES`` phases.
    """
    generator = torch.Generator().manual_seed(seed)
    skew = -torch.log(torch.arange(experts) + 1.0) if load != "even" else torch.zeros(experts)
    found = []
    for number in range(FORWARDS):
        turn = number * PHASES // FORWARDS * max(1, experts // PHASES) if load == "drifting" else 0
        noise = -torch.log(-torch.log(torch.rand(tokens, experts, generator=generator)))
        found.append((noise + skew.roll(turn)).topk(top_k).indices)
    return found


def counted(loads: list[list[int]], shape: dict[str, int], rule: str) -> dict[str, Any]:
    """Return rows of buffers and overflows of a trace: what does not depend on the machine."""
    watch = CapacityWatch(Buckets(rule=rule, window=WINDOW), shape["tokens"])
    pairs = rows = overflows = fitting = versions = 0
    for load in loads:
        if watch.fits(load):
            fitting, pairs, rows = fitting + 1, pairs + sum(load), rows + sum(watch.capacities or ())
        elif watch.capacities is not None:
            overflows += 1
        versions += watch.observe(load)
    return {"padding": 1 - pairs / max(1, rows), "overflows": overflows, "captures": versions, "fitting": fitting}


def statics(loads: list[list[int]], shape: dict[str, int]) -> dict[str, Any]:
    """Return padding and dropped share of static capacities: room for the busiest expert, and a factor of 1.25."""
    every = sum(map(sum, loads))
    peak = bucket(max(map(max, loads)), "power", shape["tokens"])
    room = round(STATIC * shape["top_k"] * shape["tokens"] / shape["experts"])
    kept = sum(min(one, room) for load in loads for one in load)
    rows = len(loads) * shape["experts"]
    return {
        "peak": {"room": peak, "padding": 1 - every / (rows * peak), "dropped": 0.0},
        "factor": {"room": room, "padding": 1 - kept / (rows * room), "dropped": 1 - kept / every},
    }


def timed(call: Any, chosen: list[Tensor]) -> float:
    """Return the milliseconds of a forward of a trace, captures included if they happen in it."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    for index in chosen:
        call(index)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / len(chosen)


def timeline(layer: BucketedLayer, follow: Callable[[Tensor], Any], chosen: list[Tensor]) -> list[list[Any]]:
    """Return, for each forward of a trace: milliseconds, graphs captured in it, and 1 if an expert had no room."""
    found = []
    for index in chosen:
        captures, overflows = layer.counts.captures, layer.counts.overflows
        torch.cuda.synchronize()
        begin = time.perf_counter()
        follow(index)
        torch.cuda.synchronize()
        took = 1e3 * (time.perf_counter() - begin)
        found.append([round(took, 4), layer.counts.captures - captures, layer.counts.overflows - overflows])
    return found


@torch.no_grad()
def times(shape: dict[str, int], chosen: list[Tensor], loads: list[list[int]]) -> dict[str, Any]:
    """Return the times of the ways to run a trace on the GPU, and the largest relative error of the buckets."""
    module = Experts(shape["experts"], shape["hidden"], shape["inner"], "cuda", torch.bfloat16)
    hidden = torch.randn(shape["tokens"], shape["hidden"], device="cuda", dtype=torch.bfloat16)
    weights = torch.rand(shape["tokens"], shape["top_k"], device="cuda", dtype=torch.bfloat16)
    chosen = [index.cuda() for index in chosen]
    layer = BucketedLayer("layer", Buckets(window=WINDOW, graphs=64))

    def follow(index: Tensor) -> Tensor:
        return layer.forward(module, hidden, index, weights, True)

    error = 0.0
    for index in chosen:
        expected = expert_product(module, hidden, index, weights, True).double()
        error = max(error, float((follow(index).double() - expected).norm() / expected.norm()))
    counts = layer.counts.to_dict()
    room = {name: (entry["room"],) * shape["experts"] for name, entry in statics(loads, shape).items()}
    graphs = {name: Graph(module, hidden, chosen[0], weights, each) for name, each in room.items()}
    held = chosen[0].clone()
    plain = torch.cuda.CUDAGraph()
    expert_product(module, hidden, held, weights, True)
    with torch.cuda.graph(plain):
        expert_product(module, hidden, held, weights, True)

    def replay_plain(index: Tensor) -> None:
        held.copy_(index)
        plain.replay()

    found: dict[str, Any] = {"relative_error": error, "counts": counts}
    ways: dict[str, Callable[[Tensor], Any]] = {
        "buckets": follow,
        "static": lambda index: graphs["peak"].replay(hidden, index, weights),
        "static, drops": lambda index: graphs["factor"].replay(hidden, index, weights),
        "product": lambda index: expert_product(module, hidden, index, weights, True),
        "product, captured": replay_plain,
    }
    for name, way in ways.items():
        timed(way, chosen[:8])
        found[name] = sorted(timed(way, chosen) for _ in range(3))[1]
    for name in ("buckets, with captures", "timeline"):
        layer.counts, layer.graphs = type(layer.counts)(), type(layer.graphs)()
        layer.watches.clear()
        found[name] = timed(follow, chosen) if name != "timeline" else timeline(layer, follow, chosen)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("model_cards/moe/buckets"))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / "buckets.json"
    former = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    gpu = torch.cuda.is_available()
    results: dict[str, Any] = {
        "forwards": FORWARDS, "window": WINDOW, "phases": PHASES, "factor": STATIC,
        "grouped": gpu or bool(former.get("grouped")),  # the times are of two grouped products
        "device": torch.cuda.get_device_name() if gpu else former.get("device"),
        "torch": torch.__version__ if gpu else former.get("torch"),
        "rows": [],
    }  # fmt: skip
    before = {(row["shape"], row["load"]): row for row in former.get("rows", [])}
    for name, shape in SHAPES.items():
        for load in LOADS:
            chosen = trace(load, shape["experts"], shape["top_k"], shape["tokens"])
            loads = [load_of(index, shape["experts"]) for index in chosen]
            row = {"shape": name, "load": load, **shape, "static": statics(loads, shape)}
            row["buckets"] = {rule: counted(loads, shape, rule) for rule in ("power", "64")}
            try:
                row["times"] = times(shape, chosen, loads) if gpu else before.get((name, load), {}).get("times")
            except Exception as error:  # the other rows are worth having
                row["times"] = None
                print(f"{name} {load}: {error}", flush=True)
            results["rows"].append(row)
            shown = {key: value for key, value in (row["times"] or row["buckets"]).items() if key != "timeline"}
            print(name, load, json.dumps(shown), flush=True)
            path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    buckets_page.write(args.output)


if __name__ == "__main__":
    main()
