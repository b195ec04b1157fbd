"""The tiles that ``sparse_attention.py tiles`` tries for each launch, and their compilation by several processes.

    python sparse_attention_tiles.py INDEX COUNT

compiles every ``COUNT``-th of them.
"""

from __future__ import annotations

import functools
import itertools
import sys

import torch
from sparse_attention_cases import BF16, BLOCKS, DEVICE, SHAPES, Shape, drawn, layout_of

from hf_optim_kernels.common import benchmark
from hf_optim_kernels.sparse_attention import launch, op
from hf_optim_kernels.sparse_attention.tiles import FORWARD, KEYS, QUERIES, Tiles, tiles

TILE_SHAPES = [Shape(12, 64, 16384, "window 256"), Shape(12, 64, 16384, "big bird"), SHAPES[-1]]
# Candidates of each launch, by (block, head size).
TRIED = {
    FORWARD: {
        (64, 64): [Tiles(*t) for t in ((64, 4, 3), (64, 4, 2), (64, 4, 4), (32, 4, 3), (32, 4, 4), (64, 8, 3))],
        (128, 64): [Tiles(*t) for t in ((128, 8, 3), (128, 8, 2), (64, 8, 3), (64, 8, 4), (64, 4, 3), (32, 8, 4))],
        (64, 128): [Tiles(*t) for t in ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 4))],
        (128, 128): [Tiles(*t) for t in ((64, 8, 3), (64, 8, 2), (128, 8, 2), (32, 8, 3), (32, 8, 4))],
    },
    QUERIES: {
        (64, 64): [Tiles(*t) for t in ((64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 4, 4))],
        (128, 64): [Tiles(*t) for t in ((64, 8, 3), (64, 8, 2), (32, 8, 3), (128, 8, 2))],
        (64, 128): [Tiles(*t) for t in ((32, 4, 3), (32, 4, 2), (64, 4, 2), (64, 8, 2))],
        (128, 128): [Tiles(*t) for t in ((32, 8, 3), (32, 8, 2), (64, 8, 2))],
    },
    KEYS: {
        (64, 64): [Tiles(*t) for t in ((32, 4, 3), (32, 4, 2), (16, 4, 3), (64, 4, 2), (64, 8, 2))],
        (128, 64): [Tiles(*t) for t in ((32, 8, 3), (32, 8, 2), (64, 8, 2))],
        (64, 128): [Tiles(*t) for t in ((32, 8, 3), (32, 8, 2), (32, 4, 2), (16, 4, 3))],
        (128, 128): [Tiles(*t) for t in ((32, 8, 3), (32, 8, 2), (16, 8, 3))],
    },
}


def tile_call(direction, shape, block, inputs):
    """A function of tiles that is one launch, with what is merged behind it."""
    layout, (q, k, v, slope), scale = layout_of(shape, block), inputs, shape.size**-0.5
    plan = op.prepare(layout, q, k)
    if direction == FORWARD:
        return lambda t: launch.forward(q, k, v, None, None, layout, plan, scale, None, t)
    out, lse = launch.forward(q, k, v, None, None, layout, plan, scale)
    delta = launch._delta(out, slope, lse, None)
    given = (slope, q, k, v, lse, delta, None, None, layout, plan, scale, None)
    grads = [torch.empty_like(each) for each in (q, k, v)]
    if direction == QUERIES:
        return lambda t: launch._query_gradient(grads[0], *given, t)
    return lambda t: launch._key_gradients(*grads[1:], *given, t)


def try_tiles():
    """Microseconds of each launch by its tiles (step, warps, stages)."""
    found = {}
    for shape, block, direction in itertools.product(TILE_SHAPES, BLOCKS, TRIED):
        calls, row = [tile_call(direction, shape, block, each) for each in drawn(shape, 2)], {}
        for given in TRIED[direction][block, shape.size]:
            try:
                row[" ".join(map(str, given))] = benchmark.graph_time(
                    [functools.partial(c, given) for c in calls], 11
                ).us
            except Exception as problem:
                print(shape, block, direction, given, type(problem).__name__, str(problem)[:120], flush=True)
        best = sorted(row.items(), key=lambda pair: pair[1])
        usual = " ".join(map(str, tiles(direction, block, shape.size, shape.size, BF16, torch.device(DEVICE))))
        found[f"{shape} {block} {direction}"] = row
        print(
            f"{shape.pattern} {block} {direction}:", "; ".join(f"{t} {us:.1f}" for t, us in best),
            f"| usual {usual} {row.get(usual, 0):.1f}", flush=True,
        )  # fmt: skip
    return found


def warm(index, count):
    """Compile every ``count``-th candidate of ``tiles`` on a short sequence."""
    jobs = [(d, *key, t) for d, by in TRIED.items() for key, each in by.items() for t in each]
    for direction, block, size, given in jobs[index::count]:
        shape = Shape(2, size, 1024, "window 256")
        try:
            tile_call(direction, shape, block, drawn(shape)[0])(given)
        except Exception as problem:
            print("warm", direction, block, size, given, str(problem)[:150], flush=True)
    torch.cuda.synchronize()


if __name__ == "__main__":
    warm(int(sys.argv[1]), int(sys.argv[2]))
