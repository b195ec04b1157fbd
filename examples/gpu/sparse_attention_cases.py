"""What ``sparse_attention.py`` computes: shapes and patterns of attention, their layouts, and random inputs."""

from __future__ import annotations

import functools
from typing import NamedTuple

import sparse_layouts
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16 = torch.bfloat16
BLOCKS = (64, 128)


class Shape(NamedTuple):
    """Heads, head size, tokens, and a pattern by name."""

    heads: int
    size: int
    n: int
    pattern: str

    @property
    def causal(self):
        return "causal" in self.pattern


PATTERNS = {
    "window 256": sparse_layouts.window,
    "globals 64": sparse_layouts.global_tokens,
    "big bird": sparse_layouts.big_bird,
    "strided 32": sparse_layouts.strided,
    "window 1024 causal": lambda n, device: sparse_layouts.window(n, device, 1023, 0),
}
ENCODER = [Shape(12, 64, n, p) for n in (4096, 16384) for p in list(PATTERNS)[:4]]
SHAPES = [*ENCODER, Shape(32, 128, 16384, "window 1024 causal")]
LENGTHS = [1 << power for power in range(10, 18)]


def pattern_of(shape):
    return PATTERNS[shape.pattern](shape.n, DEVICE)


@functools.lru_cache(maxsize=4)
def layout_of(shape, block):
    return sparse_layouts.layout(pattern_of(shape), block, shape.heads)


def drawn(shape, count=1, seed=0, dtype=BF16):
    """Queries, keys, values and upstream gradients, ``count`` times."""
    random = torch.Generator(DEVICE).manual_seed(seed)
    size = (1, shape.heads, shape.n, shape.size)
    return [[torch.randn(size, device=DEVICE, generator=random).to(dtype) for _ in range(4)] for _ in range(count)]


def sets(shape):
    """As many inputs that no call finds its own in the L2 cache, as far as memory allows."""
    return drawn(shape, 4 if shape.n <= 16384 else 2)
