"""Fetch memory into the L2 cache before a program waits for the launch before it.

The cache is where writes of all programs meet: what is fetched early is not stale when it is read.
"""

from __future__ import annotations

import triton
import triton.language as tl

PREFETCH = tl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
LINE = tl.constexpr(128)
"""Bytes of a line of the cache."""


@triton.jit
def fetch(pointers):
    """Fetch the lines of the cache that ``pointers`` are in."""
    tl.inline_asm_elementwise(PREFETCH, "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def fetch_lines(base, first, end, stride, channels, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Fetch the rows from ``first`` on, ``ROWS`` of them, at least one and none from ``end`` on, of a matrix.

    Args:
        base: pointer to its first row.
        stride: numbers from row to row.
        channels: numbers of a row, in up to ``BYTES`` bytes.
    """
    PER_LINE: tl.constexpr = LINE * 8 // base.dtype.element_ty.primitive_bitwidth
    LINES: tl.constexpr = (BYTES + LINE - 1) // LINE
    row = tl.minimum(first + tl.arange(0, ROWS), end - 1).to(tl.int64)
    column = tl.minimum(tl.arange(0, LINES) * PER_LINE, channels - 1)
    fetch(base + row[:, None] * stride + column[None, :])
