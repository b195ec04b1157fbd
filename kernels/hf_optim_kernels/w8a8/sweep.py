"""Check and time every candidate configuration of the 8-bit products on a CUDA device.

    python -m hf_optim_kernels.w8a8.sweep [--budget 100] [--ops int8 float8 llm] [--shapes 14336x4096] [--rows 1 16]

Every candidate is compared with float64 before it is timed; one that is wrong, or does not compile, is printed and
left out. Times are medians of graph replays over copies of the weight that together exceed the L2 cache, and include
the quantization of the input. Several processes compile first, since compiling takes longer than measuring. Prints a
line per shape, and writes ``sweep.json`` to ``$OUT`` (or here): ``table`` in the form of a tuning table, ``times``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.benchmark import graph_time
from ..llm_int8 import launch as llm
from ..llm_int8 import naive as llm_naive
from ..llm_int8 import tiles as llm_tiles
from . import launch, naive, tiles

SHAPES = ("14336x4096", "4096x14336", "4096x4096")
ROWS = (1, 4, 16, 64, 256, 1024, 4096)
L2_BYTES = 200 << 20
REPLAYS = 12
BOUND = 5e-3  # bfloat16 rounds by 2^-9 at most
OPS = {"int8": tiles.op_name(False), "float8": tiles.op_name(True), "llm": "llm-int8"}


class Case:
    """Random operands of one op and shape, with several copies of the weight."""

    def __init__(self, op: str, N: int, K: int, copies: int | None = None) -> None:
        torch.manual_seed(0)
        self.op, self.N, self.K = op, N, K
        codes = torch.randint(-127, 128, (N, K), device="cuda", dtype=torch.int8)
        self.weight = torch.randn(N, K, device="cuda").to(naive.FLOAT8) if op == "float8" else codes
        self.scale = torch.rand(N, device="cuda") * 0.01 + 0.001
        self.sums = codes.sum(1, dtype=torch.int32)
        count = copies or max(1, min(16, -(-L2_BYTES // (N * K))))
        self.weights = [self.weight] + [self.weight.clone() for _ in range(count - 1)]
        self.semaphores = (
            llm.semaphores_for(N, K, codes.device) if op == "llm" else launch.semaphores_for(N, codes.device)
        )

    def input(self, M: int) -> Tensor:
        """Return a random input; with eight columns of outliers for LLM.int8()."""
        torch.manual_seed(M)
        x = torch.randn(M, self.K, device="cuda", dtype=torch.bfloat16).clamp(-5.5, 5.5)
        if self.op == "llm":
            x[:, torch.randperm(self.K, device="cuda")[:8]] *= 20
        return x

    def calls(self, x: Tensor, config: dict[str, Any]) -> list[Callable[[], Tensor]]:
        """Return one call per copy of the weight; a single one where the product is bound by arithmetic."""
        weights = self.weights if len(x) <= 512 else self.weights[:1]
        if self.op == "llm":
            packed = [llm_naive.PackedTensors(w, self.scale, None, self.semaphores) for w in weights]
            return [partial(llm.llm_int8, x, each, 6.0, config) for each in packed]
        grid = naive.InputGrid(None, None, True)
        tensors = [naive.PackedTensors(w, self.scale, self.sums, None, self.semaphores) for w in weights]
        return [partial(launch.linear, x, each, grid, config) for each in tensors]

    def reference(self, x: Tensor) -> Tensor:
        """Return the specification's result in float64."""
        if self.op == "llm":
            codes, scale, columns = llm_naive.quantize_rows(x, 6.0)
            inner = codes.double().masked_fill(columns, 0) * scale[:, None].double()
            rows = torch.where(columns, x.double(), inner)
        else:
            codes, scale, _ = naive.quantize(x, self.op == "float8")
            rows = codes.double() * scale[:, None].double()
        return (rows @ self.weight.double().T) * self.scale.double()

    def candidates(self, M: int) -> list[dict[str, Any]]:
        """Return the candidates of the op, the default first."""
        rows = tuning.bucket(M)
        if self.op == "llm":
            found = [llm_tiles.default(rows, self.N, self.K), *llm_tiles.candidates(rows, self.N, self.K)]
        else:
            args = (rows, self.N, self.K, self.op == "float8")
            found = [tiles.default(*args), *tiles.candidates(*args)]
        return [config for i, config in enumerate(found) if config not in found[:i]]


def cases(options: argparse.Namespace) -> Iterator[tuple[str, int, int, int]]:
    """Yield ``(op, N, K, M)`` in the order of measuring."""
    for op in options.ops:
        for shape in options.shapes:
            N, K = map(int, shape.split("x"))
            for M in options.rows:
                yield op, N, K, M


def warm(options: argparse.Namespace, index: int, processes: int) -> None:
    """Compile a share of the candidates, by running each once: the results stay in Triton's cache on disk."""
    made: dict[tuple[str, int, int], Case] = {}
    number = 0
    for op, N, K, M in cases(options):
        if (op, N, K) not in made:
            made[op, N, K] = Case(op, N, K, 1)
        case = made[op, N, K]
        x = case.input(M)
        for config in case.candidates(M):
            number += 1
            if number % processes == index:
                try:
                    case.calls(x, config)[0]()
                except Exception as error:  # reported when it is measured
                    print(f"{op} {N}x{K} M={M} {config}: {type(error).__name__}", file=sys.stderr)


def measure(case: Case, M: int, x: Tensor, wanted: Tensor, config: dict[str, Any]) -> float | str:
    """Return the microseconds of a configuration, or what is wrong with it."""
    try:
        calls = case.calls(x, config)
        # The caching allocator hands this block to the output next.
        torch.full((M, case.N), float("nan"), dtype=x.dtype, device="cuda")
        y = calls[0]()
        error = float((y.double() - wanted).norm() / wanted.norm())
        again = torch.equal(calls[0](), y)
        if not error < BOUND or not again:
            return f"WRONG: relative error {error:.1e}, {'the same' if again else 'another'} result when repeated"
        return graph_time(calls, REPLAYS).us
    except Exception as error:  # any failure of a candidate is a result
        return f"{type(error).__name__}: {str(error)[:120]}"


def dense_time(N: int, K: int, M: int) -> float:
    """Return the microseconds of the bfloat16 product."""
    count = max(2, min(8, -(-L2_BYTES // (2 * N * K)))) if M <= 512 else 1
    weights = [torch.randn(N, K, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
    return graph_time([partial(torch.nn.functional.linear, x, w) for w in weights], REPLAYS).us


def sweep(options: argparse.Namespace, until: float) -> dict[str, Any]:
    """Measure until the time is up; return ``{"table": ..., "times": ...}``."""
    table: dict[str, dict[str, Any]] = {}
    times: list[dict[str, Any]] = []
    case: Case | None = None
    dense: dict[tuple[int, int, int], float] = {}
    for op, N, K, M in cases(options):
        if time.monotonic() > until:
            print("out of time; not measured from here:", op, N, K, M)
            break
        if case is None or (case.op, case.N, case.K) != (op, N, K):
            case = None
            case = Case(op, N, K)
        x = case.input(M)
        wanted = case.reference(x)
        results = []
        for config in case.candidates(M):
            found = measure(case, M, x, wanted, config)
            times.append({"op": OPS[op], "N": N, "K": K, "M": M, "config": config, "us": found})
            if isinstance(found, str):
                print(f"  {op} {N}x{K} M={M} {tuple(config.values())}: {found}", flush=True)
            else:
                results.append((found, config))
        if (N, K, M) not in dense:
            dense[N, K, M] = dense_time(N, K, M)
        if not results:
            continue
        best, config = min(results, key=lambda pair: pair[0])
        table[tuning.key_of(OPS[op], (N, K, tuning.bucket(M)), torch.bfloat16)] = config
        print(
            f"{op:7s} {N:6d}x{K:<6d} M={M:<5d} best {best:7.1f} default {results[0][0]:7.1f} "
            f"dense {dense[N, K, M]:7.1f}  {' '.join(map(str, config.values()))}",
            flush=True,
        )
    return {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "table": table, "times": times}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=100.0, help="seconds, compiling included")
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES))
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--processes", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--warm", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.monotonic()
    if options.warm is not None:
        warm(options, options.warm, options.processes)
        return
    command = [sys.executable, "-m", "hf_optim_kernels.w8a8.sweep", *sys.argv[1:]]
    workers = [subprocess.Popen([*command, "--warm", str(i)]) for i in range(options.processes)]
    for worker in workers:
        try:
            worker.wait(max(1.0, begin + 0.6 * options.budget - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.kill()
    print(f"compiled in {time.monotonic() - begin:.0f} s", flush=True)
    result = sweep(options, begin + options.budget)
    path = Path(os.environ.get("OUT", "."), "sweep.json")
    path.write_text(json.dumps(result, indent=1))
    print(path, f"{time.monotonic() - begin:.0f} s")


if __name__ == "__main__":
    main()
