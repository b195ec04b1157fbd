"""Attention of a new token to the rings of a layer: each program reads a piece of one ring for the heads of its group.

What a program reads is an item on the device, made once for a cache: heads that see far have several pieces, and heads
that see a few keys have one, so all heads of a layer are one launch. The first piece of a ring also writes the new key
and value into their slot. No program reads that slot: the new token comes from its own tensors.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32

# int64 of an item: see ``launch.items_of``.
ITEM = tl.constexpr(8)
UNIT = tl.constexpr(16)


@triton.jit
def _weights_of(away, count, reach, slope, HAS_RAMP: tl.constexpr):
    """Return how much keys ``away`` tokens from the query weigh, 0 where they are not seen; above 1 counts as 1."""
    if HAS_RAMP:
        found = tl.where(away < count, (reach - away.to(tl.float32)) * slope, 0.0)
    else:
        found = tl.where(away < count, 1.0, 0.0)
    return found


@triton.jit
def _ring_kernel(
    query, key, value, keys, values, tokens, counts, shares, items, out, part, sums, scale, size, ramp, slope, PARTS, H,
    D, DV, q_b, q_h, k_b, k_h, v_b, v_h,
    GROUP: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    FULL: tl.constexpr, HAS_RAMP: tl.constexpr, MATH: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention over one piece of a ring; of a ring with several, the sums that ``_merge_kernel`` adds up.

    Programs are (item, batch row), and the rows of a program are the ``GROUP`` query heads of a key head. ``scale``
    includes log2(e); ``slope`` is 1 / ``ramp``. ``part`` [B, PARTS, GROUP, DV] float32, ``sums`` [B, PARTS, GROUP, 2]:
    the largest score and the sum of powers of 2. FULL: D and DV fill their blocks. EARLY: the next launch may begin
    meanwhile.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.program_id(1)
    item = items + tl.program_id(0) * ITEM
    g, piece, pieces = tl.load(item).to(tl.int32), tl.load(item + 1).to(tl.int32), tl.load(item + 2).to(tl.int32)
    slot = tl.load(item + 3).to(tl.int32)
    first, apart = tl.load(item + 4), tl.load(item + 5)
    slots, most = tl.load(item + 6).to(tl.int32), tl.load(item + 7).to(tl.int32)
    position = tl.load(tokens + b).to(tl.int32) - 1
    rows = tl.arange(0, ROWS)
    real = rows < GROUP
    head = g * GROUP + rows
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_dv = (d < D) | FULL, (dv < DV) | FULL
    q_at = query + b.to(tl.int64) * q_b + head[:, None] * q_h + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & in_d[None, :], other=0.0)
    if MATH == FP32:
        q = q.to(tl.float32)
    count = tl.load(counts + head, mask=real, other=0)
    reach = tl.zeros((ROWS,), tl.float32)
    if HAS_RAMP:
        share = tl.load(shares + head, mask=real, other=0.0)
        reach = tl.minimum(tl.maximum(share, 0.0), 1.0) * size + ramp
    ring = first + b * apart
    own_keys, own_values = keys + ring * D, values + ring * DV
    # The keys before the new one, the farthest first, and the part of them that this program reads. Pieces differ by
    # UNIT keys at most.
    earlier = tl.minimum(most - 1, position)
    begin = (position - earlier) % slots
    units = (earlier + UNIT - 1) // UNIT
    low = units * piece // pieces * UNIT
    high = tl.minimum(units * (piece + 1) // pieces * UNIT, earlier)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    if piece == 0:
        new_key = tl.load(key + b.to(tl.int64) * k_b + g * k_h + d, mask=in_d, other=0.0)
        new_value = tl.load(value + b.to(tl.int64) * v_b + g * v_h + dv, mask=in_dv, other=0.0)
        own = position % slots
        tl.store(own_keys + own * D + d, new_key, mask=in_d)
        tl.store(own_values + own * DV + dv, new_value, mask=in_dv)
        weight = tl.minimum(_weights_of(tl.zeros((ROWS,), tl.int32), count, reach, slope, HAS_RAMP), 1.0)
        score = tl.sum(q.to(tl.float32) * new_key.to(tl.float32)[None, :], axis=1) * scale
        top = tl.where(real & (weight > 0.0), score, float("-inf"))
        total = tl.where(real, tl.maximum(weight, 0.0), 0.0)
        acc = total[:, None] * new_value.to(tl.float32)[None, :]
    in_block = tl.arange(0, BLOCK_N)
    for start in range(low, high, BLOCK_N):
        n = start + in_block
        seen = n < high
        at = begin + n
        at = tl.where(at >= slots, at - slots, at)
        k = tl.load(own_keys + (at * D)[None, :] + d[:, None], mask=seen[None, :] & in_d[:, None], other=0.0)
        if MATH == FP32:
            k = k.to(tl.float32)
        s = tl.dot(q, k, input_precision="ieee") * scale
        weight = _weights_of((earlier - n)[None, :], count[:, None], reach[:, None], slope, HAS_RAMP)
        s = tl.where(seen[None, :] & (weight > 0.0), s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        if HAS_RAMP:
            p *= tl.minimum(weight, 1.0)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(own_values + (at * DV)[:, None] + dv[None, :], mask=seen[:, None] & in_dv[None, :], other=0.0)
        if MATH == FP32:
            v = v.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    kept = real[:, None] & in_dv[None, :]
    if slot < 0:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        o_at = out + (b * H + head).to(tl.int64)[:, None] * DV + dv[None, :]
        tl.store(o_at, result.to(out.dtype.element_ty), mask=kept)
    else:
        where = (b * PARTS + slot) * GROUP + rows
        tl.store(part + where.to(tl.int64)[:, None] * DV + dv[None, :], acc, mask=kept)
        tl.store(sums + where * 2, top, mask=real)
        tl.store(sums + where * 2 + 1, total, mask=real)


@triton.jit
def _merge_kernel(
    part, sums, merges, out, PARTS, H, DV,
    GROUP: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_DV: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of a query head: out [B, H, DV]. ``merges`` [m, 4] int64: key head, first slot, pieces, 0.

    Programs are (merge and head of its group, block of channels, batch row); ``SPLITS`` is a power of two. With EARLY
    it begins while the pieces are being computed, and waits for them.
    """
    merge, own = merges + tl.program_id(0) // GROUP * 4, tl.program_id(0) % GROUP
    g, slot = tl.load(merge).to(tl.int32), tl.load(merge + 1).to(tl.int32)
    count = tl.load(merge + 2).to(tl.int32)
    dv, b = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV), tl.program_id(2)
    begin = (b * PARTS + slot) * GROUP + own
    if EARLY:
        tl.extra.cuda.gdc_wait()
    pieces = tl.arange(0, SPLITS)
    tops = tl.load(sums + (begin + pieces * GROUP) * 2, mask=pieces < count, other=float("-inf"))
    totals = tl.load(sums + (begin + pieces * GROUP) * 2 + 1, mask=pieces < count, other=0.0)
    top = tl.max(tops)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - base))
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, count, STEP):
        piece = start + tl.arange(0, STEP)
        at = begin + piece * GROUP
        weight = tl.exp2(tl.load(sums + at * 2, mask=piece < count, other=float("-inf")) - base)
        there = (piece < count)[:, None] & (dv < DV)[None, :]
        # A piece in which this head sees nothing has stored zeros.
        block = tl.load(part + at.to(tl.int64)[:, None] * DV + dv[None, :], mask=there, other=0.0)
        acc += tl.sum(block * weight[:, None], axis=0)
    result = acc / tl.where(total == 0.0, 1.0, total)
    o_at = out + (b * H + g * GROUP + own).to(tl.int64) * DV + dv
    tl.store(o_at, result.to(out.dtype.element_ty), mask=dv < DV)
