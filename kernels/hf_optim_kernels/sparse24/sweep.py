"""Check the 2:4 kernels on a CUDA device, then time configurations and keep the best.

    python -m hf_optim_kernels.sparse24.sweep [--seconds 80] [--bits 16] [--rows 1 16] [--shape 14336x4096] [--top 3]

The best configuration per shape and number of rows is written to ``sparse24.json`` in the directory ``$OUT`` (default:
here), with its time, that of the dense product, and those of all candidates. ``best`` has the form of a tuning table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.benchmark import copies_of, graph_time, relative_error
from . import bench, cusparselt, layer, mma_layout, naive, tiles

SHAPES = ["14336x4096", "4096x14336", "4096x4096"]
ROWS = [1, 16, 64, 256, 4096, 4, 128, 1024]
TILES = [tiles.tiles(8, 16, 2, 1, 4, inputs) for inputs in range(3)]
TILES += [tiles.tiles(16, 32, 1, 2, 4, 2), tiles.tiles(64, 32, 1, 1, 2, 2), tiles.DENSE]
BOUND = {torch.bfloat16: 4e-3, torch.float16: 6e-4}


def check(shape: tuple[int, int], bits: int, dtype: torch.dtype, rows: list[int], paths: list[tiles.Config]) -> float:
    """Return the largest relative error over paths. Raise if one is wrong, or if a second run differs in a bit."""
    module, weight = bench.random_weight(*shape, bits, dtype)
    if mma_layout.holds(module.bits):
        paths = TILES
    worst = 0.0
    for M in rows:
        x = torch.randn(M, shape[1], device="cuda", dtype=dtype)
        reference = x.double() @ weight.T
        for config in paths:
            # The caching allocator hands this block to the output next.
            torch.full((M, shape[0]), float("nan"), dtype=dtype, device="cuda")
            y = bench.run(module, x, config)
            again = bench.run(module, x, config)
            error = relative_error(y, reference)
            worst = max(worst, error)
            limit = BOUND[dtype] * (1 if bits == 16 else 1.5)
            if not error < limit or not torch.equal(y, again) or bool(module.semaphores.any()):
                raise AssertionError(f"{shape} {bits}-bit {dtype} M={M} {config}: relative error {error:.2e}")
    return worst


def check_all() -> None:
    """Check odd and even shapes, every width and dtype, few configurations: compiling takes longer than running."""
    paths = [
        tiles.config("row", 1, 32, 32, 2, 4, 2),
        tiles.config("dot", 16, 32, 32, 2, 2, 3),
        tiles.config("dot", 64, 64, 32, 1, 4, 3),
        tiles.DENSE,
    ]
    for shape, dtype, widths in (
        ((352, 172), torch.bfloat16, (16,)),
        ((352, 1024), torch.bfloat16, (16, 8, 4)),
        ((1000, 1280), torch.float16, (16, 4)),
    ):
        errors = {bits: check(shape, bits, dtype, [1, 5, 33], paths) for bits in widths}
        print(shape, dtype, {bits: f"{error:.1e}" for bits, error in errors.items()}, flush=True)


def algorithms(module: layer.PackedWeight, x: Tensor) -> list[tiles.Config]:
    """Return cuSPARSELt's default and the algorithm that its search prefers."""
    if not cusparselt.is_shared(module.values, module.bits):
        return []
    found = torch._cslt_sparse_mm_search(module.values, x.t(), transpose_result=True)
    return [{**tiles.LIBRARY, "algorithm": number} for number in sorted({0, int(found)})]


def times(module: layer.PackedWeight, x: Tensor, end: float) -> list[tuple[float, tiles.Config]]:
    """Return microseconds of the candidates, fastest first, without those that fail or come after ``end``."""
    (M, K), N = x.shape, naive.shape_of(module.bits)[0]
    tiled = mma_layout.holds(module.bits)
    candidates = (tiles.tiled_candidates if tiled else tiles.candidates)(N, K, M)
    candidates = [c for c in candidates if c["path"] != "library"]
    tried = [*(algorithms(module, x) if M % 8 == 0 else []), *candidates]
    return bench.timed(module, x, itertools.takewhile(lambda _: time.monotonic() < end, tried))


def sweep(shape: str, bits: int, rows: list[int], end: float, top: int) -> dict[str, Any]:
    """Time every number of rows for a shape "OUTxIN", and print a table."""
    N, K = map(int, shape.split("x"))
    module, weight = bench.random_weight(N, K, bits, torch.bfloat16)
    del weight
    dense = copies_of((bench.sparse_weight(N, K, torch.bfloat16),))
    print(f"{shape} {bits}-bit, {module.label}: {bench.stored_bytes(module) / 1e6:.1f} MB", flush=True)
    results = {}
    for M in rows:
        x = torch.randn(M, K, device="cuda", dtype=torch.bfloat16)
        plain = graph_time([partial(torch.nn.functional.linear, x, *copy) for copy in dense], 11).us
        found = times(module, x, end)
        for us, config in found[:top]:
            print(f"  M={M:5d} {us:8.1f} dense {plain:8.1f}  {' '.join(map(str, config.values()))}", flush=True)
        if found:
            op = "sparse24-tiles" if mma_layout.holds(module.bits) else "sparse24"
            shape_of = (N, K, M) if mma_layout.holds(module.bits) else (N, K, bits, M)
            key = tuning.key_of(op, shape_of, torch.bfloat16)
            results[key] = {"config": found[0][1], "us": found[0][0], "dense_us": plain, "all": found}
        if time.monotonic() > end:
            break
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=80, help="when to stop timing, checks included")
    parser.add_argument("--bits", type=int, nargs="+", default=[16, 4, 8])
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--shape", nargs="+", default=SHAPES)
    parser.add_argument("--top", type=int, default=3, help="lines to print for each number of rows")
    parser.add_argument("--no-check", action="store_true")
    options = parser.parse_args()
    end = time.monotonic() + options.seconds
    torch.manual_seed(0)
    print(torch.cuda.get_device_name(), "torch", torch.__version__, flush=True)
    if not options.no_check:
        check_all()
    results: dict[str, Any] = {}
    path = Path(os.environ.get("OUT", "."), "sparse24.json")
    for bits in options.bits:
        for shape in options.shape:
            if time.monotonic() < end:
                results |= sweep(shape, bits, options.rows, end, options.top)
                best = {key: entry["config"] for key, entry in results.items()}
                path.write_text(json.dumps({"best": best, "times": results}, indent=1), encoding="utf-8")
    print(f"{len(results)} entries in {path}")


if __name__ == "__main__":
    main()
