"""Sparse feed-forward layers whose chosen rows of both matrices are read in one launch, beside three launches.

    OUT=... PYTHONPATH=.:plugins:kernels python examples/gpu/sparse_ffn_joined.py

The layer, and how it is timed, are those of ``sparse_ffn.py``. Each variant of tiles is compared with the three
launches before it is timed; with ``early`` launches begin before the one before has ended. (A third mode, which added up
behind a barrier in a cooperative launch, is in the record of the first run: it was slower, and was removed.)
``TINY=1`` runs it in small.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from functools import partial
from typing import Any

import torch

if len(sys.argv) == 1:
    sys.argv.append("joined")  # sections of ``sparse_ffn`` have other names, and do not run
from sections import Sections
from sparse_ffn import (
    BLOCKS,
    CUDA,
    DEVICE,
    DTYPE,
    PROCESSES,
    TINY,
    UNITS,
    WIDTH,
    bytes_read,
    copies,
    draw,
    graph_time,
    layer_of,
)

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.sparse_ffn import bench, launch
from hf_optim_kernels.sparse_ffn.launch import Tiles
from hf_optim_kernels.sparse_ffn.naive import Layer, Rows

# Of each N: blocks of a tile, programs, warps, columns of W1 at a time.
TRIED = {
    64: [(2, 128, 4, 2048), (2, 128, 8, 4096), (1, 256, 4, 2048), (1, 256, 8, 4096), (1, 128, 8, 2048)],
    32: [(2, 256, 4, 2048), (4, 128, 8, 2048), (2, 128, 8, 4096), (1, 256, 8, 4096)],
    16: [(4, 256, 4, 1024), (4, 128, 8, 2048), (2, 256, 8, 2048), (8, 128, 8, 1024)],
    8: [(4, 256, 8, 1024), (8, 128, 8, 1024), (4, 128, 8, 2048), (2, 256, 4, 2048)],
    4: [(8, 128, 8, 1024), (4, 256, 8, 1024), (8, 256, 4, 512), (4, 128, 8, 2048)],
}
MODES: dict[str, dict[str, bool]] = {"plain": {}, "early": {"early": True}}
section = Sections("sparse_ffn_joined.json")


def jobs() -> list[tuple[int, tuple[int, int, int, int], str]]:
    """Return every variant: N, tiles, mode."""
    return [(n, how, mode) for n in BLOCKS for how in TRIED[n] for mode in (MODES if CUDA else ("plain",))]


def tiles_of(layer: Layer, how: tuple[int, int, int, int], mode: str) -> Tiles:
    b, programs, warps, columns = how
    base = launch.default_tiles(layer)._replace(b=b, b_warps=warps, b_k=columns, programs=programs, d=64, d_warps=4)
    return base._replace(**MODES[mode])


@section("joined-compile")
@torch.no_grad()
def compile_all() -> int | None:
    """Compile what one process of several has to, by ``PART``: the Triton cache on disk is shared."""
    part = os.environ.get("PART")
    if part is None:
        return None
    x, mine = torch.randn(1, WIDTH, device=DEVICE).to(DTYPE), jobs()[int(part) :: PROCESSES]
    up, down = draw(UNITS, WIDTH), draw(UNITS, WIDTH)
    for block, how, mode in mine:
        layer = layer_of(block, 16, up, down)
        try:
            launch.sparse_ffn(x, layer, tiles_of(layer, how, mode))
        except Exception as error:  # a grid that does not fit is noted where it is timed
            print(type(error).__name__, error, flush=True)
    return len(mine)


@section("joined")
@torch.no_grad()
def joined() -> dict[str, Any]:
    """Times by N: the layer as it is, and the variants."""
    begun = time.perf_counter()
    if CUDA and PROCESSES > 1:
        own = {**os.environ, "OUT": "/tmp"}
        others = [
            subprocess.Popen([sys.executable, __file__, "joined-compile"], env={**own, "PART": str(part)},
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for part in range(PROCESSES)
        ]  # fmt: skip
        for other in others:
            other.wait()
    print(f"compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    x, up, down = torch.randn(1, WIDTH, device=DEVICE).to(DTYPE), draw(UNITS, WIDTH), draw(UNITS, WIDTH)
    found: dict[str, Any] = {"rows": []}
    small = Layer(draw(1, 16), draw(8, 1), None, Rows(draw(8, 16)), None, Rows(draw(8, 16)), None, 8, "relu")
    memory, tiny = launch.allocate(x[:, :16], small, Tiles()), x[:, :16].contiguous()
    found["empty_launch_us"] = graph_time([partial(launch.project, tiny, small, Tiles(), memory)] * 60)
    flat = [(up, down.t().contiguous()), (up.clone(), down.t().contiguous())]
    found["dense_us"] = graph_time([partial(bench.dense, x, *pair) for pair in flat * 2])
    del flat
    print(found, flush=True)
    for block in BLOCKS:
        made = list(copies(layer_of(block, 16, up, down)))
        default = launch.default_tiles(made[0])._replace(programs=0)
        expected = launch.sparse_ffn(x, made[0], default)
        found["rows"].append({"block": block, "bytes": bytes_read(made[0]), "mode": "three launches",
                              "us": graph_time([partial(launch.sparse_ffn, x, one, default) for one in made])})  # fmt: skip
        print(found["rows"][-1], flush=True)
        for own_block, how, mode in jobs():
            if own_block != block:
                continue
            row: dict[str, Any] = {"block": block, "tiles": how, "mode": mode}
            tiles = tiles_of(made[0], how, mode)
            try:
                y = launch.sparse_ffn(x, made[0], tiles)
                row["error"] = benchmark.relative_error(y, expected)
                assert torch.equal(y, launch.sparse_ffn(x, made[0], tiles)), "not the same bits twice"
                row["us"] = graph_time([partial(launch.sparse_ffn, x, one, tiles) for one in made])
            except Exception as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:200]
            found["rows"].append(row)
        own_rows = [row for row in found["rows"] if row["block"] == block and "us" in row and "tiles" in row]
        for row in sorted(own_rows, key=lambda row: row["us"])[:4]:
            print(row, flush=True)
        print([row for row in found["rows"] if row["block"] == block and "failed" in row], flush=True)
        del made
    return found


@section("joined-tokens")
@torch.no_grad()
def by_tokens() -> list[dict[str, Any]]:
    """The time by tokens of a call, as it is and by the best variant for one token."""
    found = []
    up, down = draw(UNITS, WIDTH), draw(UNITS, WIDTH)
    for block, how in ((16, (8, 128, 8, 1024)),) if TINY else ((32, (4, 128, 8, 2048)), (64, (2, 128, 8, 4096))):
        made = list(copies(layer_of(block, 16, up, down)))
        for tokens in (1, 2, 4, 8):
            x = torch.randn(tokens, WIDTH, device=DEVICE).to(DTYPE)
            three = launch.default_tiles(made[0])._replace(programs=0)
            tiles = tiles_of(made[0], how, "early" if CUDA else "plain")
            y = launch.sparse_ffn(x, made[0], tiles)
            alone = torch.cat([launch.sparse_ffn(row[None].contiguous(), made[0], tiles) for row in x])
            assert torch.equal(y, alone), "a token's result depends on the others"
            row = {"block": block, "tokens": tokens}
            for name, one in (("us", three), ("joined_us", tiles)):
                row[name] = graph_time([partial(launch.sparse_ffn, x, each, one) for each in made])
            found.append(row)
            print(row, flush=True)
        del made
    return found
