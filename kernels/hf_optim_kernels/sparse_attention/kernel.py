"""The forward: a program reads one list of key blocks, or a piece of one, for a block of queries of a head.

Programs are numbered so that all heads have their longest lists first. Within a list, blocks that are visible in whole
come first, in a loop without masks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .parts import bits_of, load_rows, ramp_of, rows_at, segments_at, tokens_at, weights_of

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# int32 of a work item: see ``items``.
ITEM = tl.constexpr(8)


@triton.jit
def _attend(
    top, total, acc, q, token_q, segment, keys, values, segments_k, columns, masks, bits, order_k, kind, places_k,
    reach, slope, limit, scale, first, end, M, D, DV, k_n, v_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_RAMP: tl.constexpr,
    WIDE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Add the entries [first, end) of a list to a running softmax; without CHECKED they are visible in whole."""
    PARTS: tl.constexpr = BLOCK // STEP
    row, inside = tl.arange(0, BLOCK), tl.arange(0, STEP)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column = tl.load(columns + first)
    if CHECKED:
        number = tl.load(masks + first)
    # Prefetching masks two steps ahead, too, takes the registers of a third program on a multiprocessor. The next block
    # is loaded a step ahead: addresses that depend on a load of the same step would cost a stage of the pipeline.
    for step in tl.range(first * PARTS, end * PARTS, num_stages=2 if CHECKED and not WIDE else None):
        begin = step % PARTS * STEP
        start = column * BLOCK + begin
        column = tl.load(columns + (step + 1) // PARTS)
        token, real = tokens_at(order_k, kind, places_k, start + inside, M, HAS_ORDER)
        k_at = rows_at(keys, start, token, inside, k_n, d, HAS_ORDER)
        k = load_rows(k_at, real, d, D, CHECKED, FULL_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if CHECKED:
            seen = bits_of(bits, number, row, begin + inside, BLOCK)
            number = tl.load(masks + (step + 1) // PARTS)
            if HAS_SEGMENTS:  # the segment of an empty place is none
                seen &= segment[:, None] == segments_at(segments_k, token, real, -2, True)[None, :]
            else:
                seen &= real[None, :]
            s = tl.where(seen, s, float("-inf"))
        elif HAS_SEGMENTS:
            own = segments_at(segments_k, token, real, -2, False)
            s = tl.where(segment[:, None] == own[None, :], s, float("-inf"))
        if HAS_RAMP:
            weight = weights_of(token_q, token, reach, slope, limit)
            s = tl.where(weight > 0.0, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1) * scale)
        base = new_top
        if CHECKED or HAS_SEGMENTS or HAS_RAMP:
            # Rows that have seen nothing yet have -inf, of which a difference is NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s * scale - base[:, None])
        if HAS_RAMP:
            p *= tl.minimum(weight, 1.0)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v_at = rows_at(values, start, token, inside, v_n, dv, HAS_ORDER)
        v = load_rows(v_at, real, dv, DV, CHECKED, FULL_DV, WIDE)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _forward_kernel(
    query, key, value, segments_q, segments_k, heads, items, columns, masks, bits, order_q, order_k, ramp, out, lse,
    part, part_lse, scale, pairs, H, G, N, M, D, DV, ITEMS, SLOTS, places_q, places_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER_Q: tl.constexpr, HAS_ORDER_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_RAMP: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Attention of one block of queries to a list of key blocks; a piece of a list goes to its slot in ``part``.

    ``items`` [L, ITEMS, 8] (see ``items``); ``part`` [pairs, SLOTS, BLOCK, BLOCK_DV] and ``part_lse`` [pairs, SLOTS,
    BLOCK] float32, with logarithms to base 2. ``pairs`` is B times H; ``scale`` includes log2(e).
    """
    WIDE: tl.constexpr = MATH == FP32
    pair = tl.program_id(0) % pairs
    b, h = pair // H, pair % H
    kind = tl.load(heads + h)
    item = items + (kind * ITEMS + tl.program_id(0) // pairs) * ITEM
    block, first, middle, end = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    start = tl.maximum(block, 0) * BLOCK
    row, d, dv = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    token, real = tokens_at(order_q, kind, places_q, start + row, N, HAS_ORDER_Q)
    queries = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    q = load_rows(rows_at(queries, start, token, row, q_n, d, HAS_ORDER_Q), real, d, D, True, FULL_D, WIDE)
    segment = token
    if HAS_SEGMENTS:
        segment = segments_at(segments_q + b.to(tl.int64) * N, token, real, -3, True)
        segments_k += b.to(tl.int64) * M
    g = h // (H // G)
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    reach, slope, limit = ramp_of(ramp, h, HAS_RAMP)
    top = tl.full((BLOCK,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    acc = tl.zeros((BLOCK, BLOCK_DV), tl.float32)
    top, total, acc = _attend(
        top, total, acc, q, token, segment, keys, values, segments_k, columns, masks, bits, order_k, kind, places_k,
        reach, slope, limit, scale, first, middle, M, D, DV, k_n, v_n,
        BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_K, HAS_RAMP, WIDE, False,
    )  # fmt: skip
    top, total, acc = _attend(
        top, total, acc, q, token, segment, keys, values, segments_k, columns, masks, bits, order_k, kind, places_k,
        reach, slope, limit, scale, middle, end, M, D, DV, k_n, v_n,
        BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_K, HAS_RAMP, WIDE, True,
    )  # fmt: skip
    some = total > 0.0
    result = acc / tl.where(some, total, 1.0)[:, None]
    logs = tl.where(some, top + tl.log2(tl.where(some, total, 1.0)), float("-inf"))
    slot = tl.load(item + 4)
    if HAS_SLOTS:
        own = (pair * SLOTS + tl.maximum(slot, 0)).to(tl.int64) * BLOCK + row
        in_part = slot + 0 * row >= 0
        tl.store(part + own[:, None] * BLOCK_DV + dv[None, :], result, mask=in_part[:, None] & (dv >= 0)[None, :])
        tl.store(part_lse + own, logs, mask=in_part)
    kept = (slot + 0 * row == -1) & real
    o_at = rows_at(out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h, start, token, row, o_n, dv, HAS_ORDER_Q)
    tl.store(o_at, result.to(out.dtype.element_ty), mask=kept[:, None] & (dv < DV)[None, :])
    tl.store(lse + pair.to(tl.int64) * N + token, logs * LN2, mask=kept)
