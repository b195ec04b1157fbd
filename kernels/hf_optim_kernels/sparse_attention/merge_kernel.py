"""The pieces of a list that was cut are merged: outputs by their lse, gradients by addition, always in one order."""

from __future__ import annotations

import triton
import triton.language as tl

from .kernel import LN2
from .parts import rows_at, tokens_at

# int32 of an entry of ``merges``: a block, its first slot, the slot after its last.
MERGE = tl.constexpr(4)


@triton.jit
def _merge_kernel(
    part, part_lse, tables, merges, heads, order, out, lse, pairs, P, R, N, DV, MERGES, SLOTS, places, o_b, o_h, o_n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_ORDER: tl.constexpr, WEIGHTED: tl.constexpr,
):  # fmt: skip
    """Merge ``ROWS`` rows of the pieces of one block: out [B, P, N, DV]; WEIGHTED: by their lse, else the sum.

    ``merges`` [T, MERGES, 4] has a table for each of the P heads, ``tables`` [P]; head ``p`` has the order of layout
    ``heads[p R]``. ``part`` [pairs, SLOTS, BLOCK, BLOCK_DV] and ``part_lse`` [pairs, SLOTS, BLOCK], of base 2.
    """
    CHUNKS: tl.constexpr = BLOCK // ROWS
    chunk, pair = tl.program_id(0) % CHUNKS, tl.program_id(0) // CHUNKS % pairs
    b, p = pair // P, pair % P
    merge = merges + (tl.load(tables + p) * MERGES + tl.program_id(0) // (CHUNKS * pairs)) * MERGE
    block, first, end = tl.load(merge), tl.load(merge + 1), tl.load(merge + 2)
    start = tl.maximum(block, 0) * BLOCK + chunk * ROWS
    row, dv = tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    token, real = tokens_at(order, tl.load(heads + p * R), places, start + row, N, HAS_ORDER)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for slot in range(first, end):
        own = (pair * SLOTS + slot).to(tl.int64) * BLOCK + chunk * ROWS + row
        piece = tl.load(part + own[:, None] * BLOCK_DV + dv[None, :])
        if WEIGHTED:
            logs = tl.load(part_lse + own)
            new_top = tl.maximum(top, logs)
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink, weight = tl.exp2(top - base), tl.exp2(logs - base)
            total = total * shrink + weight
            acc = acc * shrink[:, None] + piece * weight[:, None]
            top = new_top
        else:
            acc += piece
    kept = (block + 0 * row >= 0) & real
    if WEIGHTED:
        some = total > 0.0
        acc = acc / tl.where(some, total, 1.0)[:, None]
        logs = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
        tl.store(lse + pair.to(tl.int64) * N + token, logs * LN2, mask=kept)
    at = rows_at(out + b.to(tl.int64) * o_b + p.to(tl.int64) * o_h, start, token, row, o_n, dv, HAS_ORDER)
    tl.store(at, acc.to(out.dtype.element_ty), mask=kept[:, None] & (dv < DV)[None, :])
