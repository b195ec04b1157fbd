"""Check, then time the products on layers of models that no table and no fit has seen, beside the dense product.

    python -m hf_optim_kernels.common.held_out [--budget 100] [--ops w4a16 ...] [--shapes 3584x18944 ...] [--rows 1 16]
        [--choice choice.json]

Each product runs in the configuration that a layer would choose; tables of tuned tiles are not read. Outputs are
poisoned and compared with float64 first. Times are medians of graph replays over copies of the weight that together
exceed the L2 cache, quantization of inputs included. ``held-out.json`` in ``$OUT`` (or here) is written after every
shape. With ``--search`` the time that is left goes into timing every candidate, for what the choice loses.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from ..sparse24 import cusparselt
from . import benchmark, choice, sweep, tuner, tuning

# Layers (out, in) of Qwen2.5-7B, Llama-3-70B, Qwen2.5-14B, Phi-4, Gemma-2-9B and Mistral-Small-24B.
SHAPES = (
    "3584x18944", "3584x3584", "8192x28672", "8192x8192", "4608x3584", "5120x13824", "37888x3584", "5120x5120",
    "10240x8192", "5120x17920", "3584x14336", "6144x5120",
)  # fmt: skip
ROWS = (1, 16, 64, 128, 256, 512, 1024, 4096, 8192)
OPS = ("w4a16", "w8a16", "w8a8-int8", "w8a8-float8", "sparse24", "llm-int8")
SEARCHED = (64, 128, 256, 512, 1024)


def warm(options: argparse.Namespace, index: int) -> None:
    """Compile a share of the cells, by running each once: the results stay in Triton's cache on disk."""
    benchmark.copies_for = lambda size: 1  # type: ignore[assignment]
    number = 0
    for N, K in sweep.shapes_of(options):
        for op in options.ops:
            number += 1
            if number % options.processes != index:
                continue
            for tunable in sweep.tunables([op], N, K):
                for M in options.rows:
                    try:
                        tunable.calls(tunable.inputs(M), None)[0]()  # type: ignore[arg-type]
                    except Exception as error:  # reported when it is measured
                        print(f"{op} {N}x{K} M={M}: {str(error)[:80]}", file=sys.stderr)


def measure(options: argparse.Namespace, until: float) -> None:
    """Measure until the time is up."""
    cells: list[dict[str, Any]] = []
    times: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    path = Path(os.environ.get("OUT", "."), "held-out.json")

    def write() -> None:
        path.write_text(json.dumps({**about, "cells": cells, "dense": dense, "times": times}))

    for N, K in sweep.shapes_of(options):
        for M in options.rows:
            dense[f"{N}x{K}x{M}"] = sweep.dense_time(N, K, M)
        for tunable in sweep.tunables(options.ops, N, K):
            if time.monotonic() > until:
                print("out of time; not measured from here:", tunable.op, N, K, flush=True)
                write()
                return
            line = []
            for M in options.rows:
                found = next(tuner.measure(tunable, M, [None]))[1]  # type: ignore[list-item]
                base = dense[f"{N}x{K}x{M}"]
                cells.append({"op": tunable.op, "N": N, "K": K, "M": M, "us": found, "dense_us": base})
                line.append(f"{base / found:5.2f}" if isinstance(found, float) else found[:60])
            print(f"{tunable.op:12s} {N:6d}x{K:<6d} {' '.join(line)}", flush=True)
        write()
        gc.collect()
        torch.cuda.empty_cache()
    if not options.search:
        return
    for N, K in sweep.shapes_of(options):
        for tunable in sweep.tunables(options.ops, N, K):
            for M in SEARCHED:
                if time.monotonic() > until:
                    write()
                    return
                every = tuner.measure(tunable, M)
                times += [{"op": tunable.op, "N": N, "K": K, "M": M, "config": c, "us": us} for c, us in every]
        gc.collect()
        torch.cuda.empty_cache()
    write()


def markdown(path: Path) -> str:
    """Return a table of a file that this module wrote: times of the dense product over ours, those below 0.97 bold."""
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    rows = sorted({cell["M"] for cell in cells})
    found = {(cell["N"], cell["K"], cell["op"], cell["M"]): cell for cell in cells}
    lines = [f"| layer | product | {' | '.join(map(str, rows))} |", "|---" * (2 + len(rows)) + "|"]
    for N, K, op in dict.fromkeys(key[:3] for key in found):
        line = []
        for M in rows:
            cell = found.get((N, K, op, M), {})
            measured = isinstance(cell.get("us"), float)
            ratio = cell["dense_us"] / cell["us"] if measured else 0.0
            line.append("-" if not measured else f"**{ratio:.2f}**" if ratio < 0.97 else f"{ratio:.2f}")
        lines.append(f"| {N} x {K} | {op} | {' | '.join(line)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds, compiling included")
    parser.add_argument("--ops", nargs="+", choices=list(sweep.MODULES), default=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--choice", type=Path, help="a fit of the choice, in place of the shipped one (calibrate)")
    parser.add_argument("--search", action="store_true", help="then time every candidate, until the time is up")
    parser.add_argument("--table", type=Path, help="print a Markdown table of this file, and measure nothing")
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table:
        print(markdown(options.table), end="")
        return
    begin = time.monotonic()
    if options.choice:
        choice.FILE = options.choice
    tuning.table = lambda device: {}  # type: ignore[assignment]
    # Replayed graphs do not wait for the host, and what is checked is what they hold.
    cusparselt.pays = lambda *shape: True  # type: ignore[assignment]
    if options.warm is not None:
        warm(options, options.warm)
        return
    command = [sys.executable, "-m", "hf_optim_kernels.common.held_out", *sys.argv[1:]]
    workers = [subprocess.Popen([*command, "--warm", str(i)]) for i in range(options.processes)]
    for worker in workers:
        try:
            worker.wait(max(1.0, begin + 0.4 * options.budget - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"compiled in {time.monotonic() - begin:.0f} s; times of the dense product over ours at M = {options.rows}")
    measure(options, begin + options.budget)
    print(f"{time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
