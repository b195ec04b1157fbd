"""The Triton kernel of one block of columns (see ``naive`` for the equations).

A program keeps its rows of the block in registers and goes through the columns one by one; rows do not depend on each
other. Column j of the tile is not read again once it is rounded, so the error takes its place: at the end, the tile
holds the errors that the columns beyond the block compensate.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.numerics import ROUND, divide


@triton.jit(do_not_specialize=["begin", "width"])
def block_kernel(
    rest, weight, upper, order, scale, zero, codes, errors, begin, width, rows, columns, groups, group_size,
    LOW: tl.constexpr, HIGH: tl.constexpr, HAS_ZERO: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Round columns ``begin`` to ``begin + width`` (at most BLOCK_C) of ``rest``, in the order of the recursion.

    ``rest`` float32 [rows, columns], columns in order; ``weight`` [rows, columns] and ``codes`` int8 [rows, columns],
    columns as in the weight; ``upper`` float32 [columns, columns]; ``order`` int32 [columns]; ``scale`` float32 and
    ``zero`` int8 [rows, groups]; ``errors`` float32 [rows, width].
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    at = row.to(tl.int64)
    c = tl.arange(0, BLOCK_C)
    shown = inside[:, None] & (c < width)[None, :]
    tile = tl.load(rest + at[:, None] * columns + (begin + c)[None, :], shown, 0.0)
    corner = upper + begin.to(tl.int64) * columns + begin
    for j in range(width):
        column = tl.load(order + begin + j)
        group = at * groups + column // group_size
        step = tl.load(scale + group, inside, 1.0)
        kept = tl.load(weight + at * columns + column, inside, 0.0) != 0.0
        here = (c == j)[None, :]
        free = tl.sum(tl.where(here, tile, 0.0), 1)
        ratio = divide(free, step)
        if HAS_ZERO:  # noqa: SIM108
            shift = tl.load(zero + group, inside, 0).to(tl.float32)
        else:
            shift = tl.zeros([BLOCK_R], tl.float32)
        code = tl.minimum(tl.maximum(ratio + shift, LOW), HIGH)
        code = tl.where(kept, (code + ROUND) - ROUND, shift)
        error = divide(free - (code - shift) * step, tl.load(corner))
        u = tl.load(corner + c - j, (c > j) & (c < width), 0.0)
        tile = tl.where(here, error[:, None], tile - error[:, None] * u[None, :])
        tl.store(codes + at * columns + column, code.to(tl.int8), inside)
        corner += columns + 1
    tl.store(errors + at[:, None] * width + c[None, :], tile, shown)
