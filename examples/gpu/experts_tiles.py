"""The tiles that ``experts.py tiles`` tries for each launch, and their compilation by several processes at a time.

    python experts_tiles.py tiles|blocks INDEX COUNT

compiles every ``COUNT``-th of them, or of the kernels of whole layers.
"""

from __future__ import annotations

import itertools
import sys

import torch
from experts_cases import SHAPES, TOKENS, batch, layers

from hf_optim_kernels.experts import launch, routing
from hf_optim_kernels.experts.launch import Tiles

DECODE_UP = [
    Tiles(*t)
    for t in ((16, 256, 4, 3), (8, 256, 2, 3), (4, 512, 4, 3), (16, 256, 4, 4), (32, 256, 8, 3), (16, 128, 4, 5))
]
DECODE_DOWN = [
    Tiles(n, k, w, s, split=p) for n, k, w, s, p in (
        (16, 256, 2, 3, 8), (32, 256, 4, 3, 8), (16, 256, 2, 4, 8), (8, 256, 1, 3, 8), (32, 128, 4, 4, 8), (32, 256, 4, 4, 4),
        (16, 128, 2, 5, 8), (64, 256, 8, 3, 8),
    )
]  # fmt: skip
DECODE_UP_TRANSPOSED = [
    Tiles(*t) for t in ((32, 64, 4, 3), (64, 64, 4, 4), (32, 128, 4, 3), (64, 32, 4, 4), (32, 64, 4, 5), (32, 32, 2, 5))
]
DECODE_DOWN_TRANSPOSED = [
    Tiles(n, k, w, s, split=4) for n, k, w, s in ((64, 64, 4, 3), (128, 32, 4, 4), (64, 128, 4, 3), (64, 64, 4, 5), (64, 32, 2, 5), (128, 64, 4, 4))
]  # fmt: skip
_TMA, _RUN = {"described": True}, {"described": True, "persistent": True}
UP = {
    16: [Tiles(32, 256, 4, 3), Tiles(64, 128, 4, 3), Tiles(64, 128, 4, 4), Tiles(64, 128, 4, 4, **_TMA), Tiles(32, 128, 4, 4, **_TMA)],
    32: [Tiles(32, 128, 4, 4), Tiles(64, 128, 4, 3, **_TMA), Tiles(64, 64, 4, 5, **_TMA)],
    64: [Tiles(64, 64, 4, 4), Tiles(64, 64, 4, 4, **_TMA), Tiles(128, 64, 8, 4, **_TMA), Tiles(128, 64, 4, 3, **_TMA), Tiles(64, 128, 4, 3, **_TMA)],
    128: [Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3, **_TMA), Tiles(128, 64, 8, 4, **_TMA), Tiles(128, 64, 8, 4, halves=True, **_TMA),
          Tiles(128, 64, 8, 4, group=4, **_TMA), Tiles(64, 64, 4, 3, **_TMA), Tiles(64, 64, 8, 4, **_TMA)],
}  # fmt: skip
DOWN = {
    16: [Tiles(128, 128, 4, 4), Tiles(64, 128, 4, 4), Tiles(128, 128, 4, 4, **_TMA)],
    32: [Tiles(128, 128, 4, 3), Tiles(128, 128, 4, 3, **_TMA), Tiles(128, 64, 4, 5, **_TMA)],
    64: [Tiles(128, 64, 4, 4), Tiles(128, 64, 4, 4, **_TMA), Tiles(256, 64, 8, 4, **_TMA), Tiles(128, 64, 4, 4, **_RUN), Tiles(256, 64, 4, 3, **_RUN)],
    128: [Tiles(256, 64, 8, 4), Tiles(256, 64, 8, 3, **_TMA), Tiles(256, 64, 8, 4, **_TMA), Tiles(256, 64, 8, 3, **_RUN), Tiles(128, 64, 8, 4, **_RUN),
          Tiles(128, 64, 4, 4, **_RUN), Tiles(128, 64, 8, 4, **_TMA), Tiles(256, 64, 8, 3, group=4, **_RUN)],
}  # fmt: skip
# The first product with rows that were gathered before.
GATHERED = {128: [Tiles(128, 64, 8, 3, **_RUN), Tiles(128, 64, 8, 3, group=4, **_RUN), Tiles(64, 64, 8, 4, **_RUN)]}
# Tokens -> rows of blocks that are tried.
BLOCKS = {
    "qwen3-30b-a3b": {8: (16,), 64: (16,), 512: (64, 32), 4096: (128, 64)},
    "mixtral": {8: (16,), 64: (32, 64), 512: (128,), 4096: (128,)},
    "gpt-oss-20b": {8: (16,), 64: (16,), 512: (128, 64), 4096: (128,)},
}


def launches(name, tokens, block, which, situation):
    """A function of tiles that is one launch: 0 the first product, 1 the second, 2 the first of gathered rows."""
    shape, (given, hidden, chosen, weights) = SHAPES[name], situation
    if block == 0:
        usual = (DECODE_UP_TRANSPOSED if shape.transposed else DECODE_UP)[0]
        middle, semaphores = launch.decode_up(hidden, chosen, given, shape.gate, usual)
        if which == 0:
            return lambda t: launch.decode_up(hidden, chosen, given, shape.gate, t)
        return lambda t: launch.decode_down(middle, semaphores, chosen, weights, given, t, torch.bfloat16)
    found = routing.route(chosen, shape.experts, block)
    up, down = given.matrices
    if which == 1:
        middle = torch.randn(tokens * shape.top_k, shape.inner, device="cuda", dtype=torch.bfloat16)
        return lambda t: launch.rows_product(middle, down, given.down_bias, found, 0, True, block, None, t)
    x, top_k = (hidden, shape.top_k) if which == 0 else (hidden[found.order // shape.top_k], 0)
    return lambda t: launch.rows_product(x, up, given.up_bias, found, top_k, False, block, shape.gate, t)


def trials():
    """(shape, tokens, rows of a block, which product, tiles)."""
    for name in BLOCKS:
        decode = (DECODE_UP_TRANSPOSED, DECODE_DOWN_TRANSPOSED) if SHAPES[name].transposed else (DECODE_UP, DECODE_DOWN)
        for which in (0, 1):
            yield from ((name, 1, 0, which, t) for t in decode[which])
        for tokens, blocks in BLOCKS[name].items():
            for block, (which, tiles) in itertools.product(blocks, enumerate((UP, DOWN, GATHERED))):
                yield from ((name, tokens, block, which, t) for t in tiles.get(block, ()))


def warm(what, index, count):
    """Compile the kernels of every ``count``-th trial (``tiles``), or those of whole layers (``blocks``)."""
    todo = sorted({(n, b, w, t): None for n, _, b, w, t in trials()}, key=str)[index::count] if what == "tiles" else []
    for name, block, which, tiles in sorted(todo, key=lambda one: one[0]):
        try:
            launches(name, 2, block, which, (layers(name, 1)[0], *batch(name, 2)))(tiles)
        except Exception as problem:
            print("warm", name, block, which, tiles, type(problem).__name__, str(problem)[:200], flush=True)
    for name, tokens in list(itertools.product(SHAPES, TOKENS))[index::count]:
        layers.cache_clear()
        launch.mixture(*batch(name, tokens), layers(name, 1)[0], SHAPES[name].gate)
    torch.cuda.synchronize()


def short_name(tiles):
    usual = Tiles(0, 0, 0, 0)
    extra = [f"{n}={getattr(tiles, n)}" for n in Tiles._fields[4:] if getattr(tiles, n) != getattr(usual, n)]
    return " ".join(map(str, (*tiles[:4], *extra)))


if __name__ == "__main__":
    warm(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
