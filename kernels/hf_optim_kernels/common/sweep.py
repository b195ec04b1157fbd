"""Check and time every candidate of every product on a CUDA device, beside the dense product.

    python -m hf_optim_kernels.common.sweep [--budget 100] [--ops w4a16 sparse24] [--shapes 14336x4096] [--rows 1 16]

Times are medians of graph replays over copies of the weight that together exceed the L2 cache, and include the
quantization of inputs. Several processes compile first, since compiling takes longer than measuring. Prints a line per
shape and number of rows, and writes ``sweep.json`` to ``$OUT`` (or here), after every shape, so that what is measured
is kept: ``table`` in the form of a tuning table, ``times`` of every candidate, ``dense`` times.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from . import benchmark, tuner, tuning

MODULES = {
    "w4a16": "wna16", "w8a16": "wna16", "nvfp4": "wna16", "mxfp4": "wna16", "w8a8-int8": "w8a8",
    "w8a8-float8": "w8a8", "llm-int8": "llm_int8", "sparse24": "sparse24", "sparse24-tiles": "sparse24",
}  # fmt: skip
SHAPES = ("14336x4096", "4096x14336", "4096x4096")
ROWS = (1, 16, 64, 128, 256, 512, 1024, 4096)


def tunables(ops: list[str], N: int, K: int) -> Iterator[tuner.Tunable]:
    """Yield the layers of a shape for the names of ``ops``, one after the other."""
    for module in dict.fromkeys(MODULES[op] for op in ops):
        for found in benchmark.bench_of(module).tunables(N, K):
            if found.op in ops:
                yield found


def dense_time(N: int, K: int, M: int) -> float:
    """Return the microseconds of the bfloat16 product."""
    weight = torch.randn(N, K, device="cuda", dtype=torch.bfloat16)
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    calls = [partial(torch.nn.functional.linear, x, *copy) for copy in benchmark.copies_of((weight,))]
    return benchmark.graph_time(calls, tuner.REPLAYS).us


def shapes_of(options: argparse.Namespace) -> list[tuple[int, int]]:
    """Return the shapes (out, in) of the command line."""
    return [(int(shape.split("x")[0]), int(shape.split("x")[1])) for shape in options.shapes]


def tried(options: argparse.Namespace, tunable: tuner.Tunable, M: int) -> list[tuner.Config]:
    """Return the candidates, or those of some kernels."""
    found = tunable.candidates(tuning.bucket(M))
    return [c for c in found if not options.only or c.get("KERNEL", c.get("path")) in options.only]


def warm(options: argparse.Namespace, index: int) -> None:
    """Compile a share of the candidates, by running each once: the results stay in Triton's cache on disk."""
    benchmark.copies_for = lambda size: 1  # type: ignore[assignment]
    owners: dict[Any, int] = {}  # a configuration belongs to one process, whatever the shape: it is compiled once
    for N, K in shapes_of(options):
        for tunable in tunables(options.ops, N, K):
            for M in options.rows:
                x = None
                for config in tried(options, tunable, M):
                    key = (tunable.op, *config.values())
                    if owners.setdefault(key, len(owners)) % options.processes == index:
                        x = tunable.inputs(M) if x is None else x
                        try:
                            tunable.calls(x, config)[0]()
                        except Exception as error:  # reported when it is measured
                            print(f"{tunable.op} {N}x{K} M={M} {config}: {str(error)[:80]}", file=sys.stderr)


def sweep(options: argparse.Namespace, until: float) -> None:
    """Measure until the time is up."""
    table: dict[str, Any] = {}
    times: list[dict[str, Any]] = []
    dense: dict[str, float] = {}
    properties = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    path = Path(os.environ.get("OUT", "."), options.name)

    def write() -> None:
        path.write_text(json.dumps({**properties, "table": table, "dense": dense, "times": times}))

    for N, K in shapes_of(options):
        for M in options.rows:
            dense[f"{N}x{K}x{M}"] = dense_time(N, K, M)
        for tunable in tunables(options.ops, N, K):
            for M in options.rows:
                if time.monotonic() > until:
                    print("out of time; not measured from here:", tunable.op, N, K, M, flush=True)
                    write()
                    return
                found = list(tuner.measure(tunable, M, tried(options, tunable, M)))
                times += [{"op": tunable.op, "N": N, "K": K, "M": M, "config": c, "us": us} for c, us in found]
                for config, us in found:
                    if isinstance(us, str):
                        print(f"  {tunable.op} {N}x{K} M={M} {tuple(config.values())}: {us}", flush=True)
                ranked = sorted((p for p in found if not isinstance(p[1], str)), key=lambda pair: float(pair[1]))
                if not ranked:
                    continue
                table[tuning.key_of(tunable.op, (*tunable.shape, tuning.bucket(M)), tunable.dtype)] = ranked[0][0]
                base = dense[f"{N}x{K}x{M}"]
                top = "   ".join(f"{us:.1f} " + "/".join(map(str, config.values())) for config, us in ranked[:3])
                print(f"{tunable.op:12s} {N:6d}x{K:<6d} M={M:<5d} x{base / float(ranked[0][1]):.2f} dense {base:7.1f}"
                      f" | {top}", flush=True)  # fmt: skip
        write()
        gc.collect()
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds, compiling included")
    parser.add_argument("--ops", nargs="+", choices=list(MODULES), default=list(MODULES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--processes", type=int, default=max(1, min(14, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--name", default="sweep.json", help="file in $OUT")
    parser.add_argument("--only", nargs="+", default=[], help="time only the configurations of these kernels")
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.monotonic()
    if options.warm is not None:
        warm(options, options.warm)
        return
    command = [sys.executable, "-m", "hf_optim_kernels.common.sweep", *sys.argv[1:]]
    workers = [subprocess.Popen([*command, "--warm", str(i)]) for i in range(options.processes)]
    for worker in workers:
        try:
            worker.wait(max(1.0, begin + 0.5 * options.budget - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    sweep(options, begin + options.budget)
    print(f"{time.monotonic() - begin:.0f} s", flush=True)


if __name__ == "__main__":
    main()
