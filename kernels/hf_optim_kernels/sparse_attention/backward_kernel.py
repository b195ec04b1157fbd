"""The backward: gradients of queries by query block, of keys and values by key block. No atomics: equal bits always.

Scores are computed again; ``P = exp2(S - lse)`` needs no running maximum. Queries that see nothing, and empty places,
have an lse of ``+inf`` here, so that their ``P`` is 0. ``delta`` is ``rowsum(dO O) - dlse``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .kernel import ITEM, LOG2E
from .parts import bits_of, load_rows, numbers_at, ramp_of, rows_at, segments_at, tokens_at, weights_of


@triton.jit
def _delta_kernel(
    out, grad_out, lse, grad_lse, delta, H, N, DV, o_b, o_h, o_n, g_b, g_h, g_n, l_b, l_h, l_n,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr, HAS_LSE: tl.constexpr,
):  # fmt: skip
    """``delta`` [B, H, N] float32 of ``ROWS`` queries of a head; 0 for those that see nothing, whatever is given."""
    chunks = tl.cdiv(N, ROWS)
    token, dv = tl.program_id(0) % chunks * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    pair = (tl.program_id(0) // chunks).to(tl.int64)
    b, h = pair // H, pair % H
    real = (token < N)[:, None] & (dv < DV)[None, :]
    row = token.to(tl.int64)
    o = tl.load(out + b * o_b + h * o_h + (row * o_n)[:, None] + dv[None, :], mask=real, other=0.0)
    g = tl.load(grad_out + b * g_b + h * g_h + (row * g_n)[:, None] + dv[None, :], mask=real, other=0.0)
    found = tl.sum(o.to(tl.float32) * g.to(tl.float32), axis=1)
    if HAS_LSE:
        found -= tl.load(grad_lse + b * l_b + h * l_h + row * l_n, mask=token < N, other=0.0).to(tl.float32)
    blind = tl.load(lse + pair * N + token, mask=token < N, other=0.0) == float("-inf")
    tl.store(delta + pair * N + token, tl.where(blind, 0.0, found), mask=token < N)


@triton.jit
def _logs_at(lse, token, real, CHECKED: tl.constexpr):
    """Return the lse of each token to base 2, ``+inf`` for those that see nothing."""
    found = numbers_at(lse, token, real, float("inf"), CHECKED)
    return tl.where(found == float("-inf"), float("inf"), found * LOG2E)


@triton.jit
def _add_query_gradient(
    acc, ramped, q, g, logs, delta, token_q, segment, keys, values, segments_k, columns, masks, bits, order_k, kind,
    places_k, reach, slope, limit, scale, first, end, M, D, DV, k_n, v_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_RAMP: tl.constexpr,
    WIDE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Add what the entries [first, end) of a list give to the gradient of a block of queries."""
    PARTS: tl.constexpr = BLOCK // STEP
    row, inside = tl.arange(0, BLOCK), tl.arange(0, STEP)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    column = tl.load(columns + first)
    if CHECKED:
        number = tl.load(masks + first)
    for step in range(first * PARTS, end * PARTS):
        begin = step % PARTS * STEP
        start = column * BLOCK + begin
        column = tl.load(columns + (step + 1) // PARTS)
        token, real = tokens_at(order_k, kind, places_k, start + inside, M, HAS_ORDER)
        k_at = rows_at(keys, start, token, inside, k_n, d, HAS_ORDER)
        v_at = rows_at(values, start, token, inside, v_n, dv, HAS_ORDER)
        k = load_rows(k_at, real, d, D, CHECKED, FULL_D, WIDE)
        v = load_rows(v_at, real, dv, DV, CHECKED, FULL_DV, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(s * scale - logs[:, None])
        if CHECKED:
            seen = bits_of(bits, number, row, begin + inside, BLOCK)
            number = tl.load(masks + (step + 1) // PARTS)
            if HAS_SEGMENTS:
                seen &= segment[:, None] == segments_at(segments_k, token, real, -2, True)[None, :]
            else:
                seen &= real[None, :]
            p = tl.where(seen, p, 0.0)
        elif HAS_SEGMENTS:
            own = segments_at(segments_k, token, real, -2, False)
            p = tl.where(segment[:, None] == own[None, :], p, 0.0)
        inner = p * (tl.dot(g, tl.trans(v), input_precision="ieee") - delta[:, None])
        if HAS_RAMP:
            weight = weights_of(token_q, token, reach, slope, limit)
            inner = tl.where(weight > 0.0, inner, 0.0)  # what is not seen may be infinite
            ramped += tl.sum(tl.where(weight <= 1.0, inner, 0.0), axis=1)
            inner *= tl.minimum(weight, 1.0)
        acc += tl.dot(inner.to(k.dtype), k, input_precision="ieee")
    return acc, ramped


@triton.jit
def _query_kernel(
    query, key, value, segments_q, segments_k, heads, items, columns, masks, bits, order_q, order_k, ramp, grad_out,
    lse, delta, grad_query, grad_ramp, part, scale, pairs, H, G, N, M, D, DV, ITEMS, SLOTS, places_q, places_k,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, o_b, o_h, o_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER_Q: tl.constexpr, HAS_ORDER_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_RAMP: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries, over a list of key blocks or a piece of one: as ``_forward_kernel``.

    ``part`` [pairs, SLOTS, BLOCK, BLOCK_D] float32. ``scale`` is that of the scores, without log2(e). ``grad_ramp``
    [pairs, ITEMS] float32: what each item gives to the gradient of ``reach``, without the factor ``slope``.
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
    grads = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    q = load_rows(rows_at(queries, start, token, row, q_n, d, HAS_ORDER_Q), real, d, D, True, FULL_D, WIDE)
    g = load_rows(rows_at(grads, start, token, row, g_n, dv, HAS_ORDER_Q), real, dv, DV, True, FULL_DV, WIDE)
    logs = _logs_at(lse + pair.to(tl.int64) * N, token, real, True)
    own_delta = numbers_at(delta + pair.to(tl.int64) * N, token, real, 0.0, True)
    segment = token
    if HAS_SEGMENTS:
        segment = segments_at(segments_q + b.to(tl.int64) * N, token, real, -3, True)
        segments_k += b.to(tl.int64) * M
    kv = h // (H // G)
    keys = key + b.to(tl.int64) * k_b + kv.to(tl.int64) * k_h
    values = value + b.to(tl.int64) * v_b + kv.to(tl.int64) * v_h
    reach, slope, limit = ramp_of(ramp, h, HAS_RAMP)
    acc, ramped = tl.zeros((BLOCK, BLOCK_D), tl.float32), tl.zeros((BLOCK,), tl.float32)
    acc, ramped = _add_query_gradient(
        acc, ramped, q, g, logs, own_delta, token, segment, keys, values, segments_k, columns, masks, bits, order_k,
        kind, places_k, reach, slope, limit, scale * LOG2E, first, middle, M, D, DV, k_n, v_n,
        BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_K, HAS_RAMP, WIDE, False,
    )  # fmt: skip
    acc, ramped = _add_query_gradient(
        acc, ramped, q, g, logs, own_delta, token, segment, keys, values, segments_k, columns, masks, bits, order_k,
        kind, places_k, reach, slope, limit, scale * LOG2E, middle, end, M, D, DV, k_n, v_n,
        BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_K, HAS_RAMP, WIDE, True,
    )  # fmt: skip
    acc *= scale
    if HAS_RAMP:
        tl.store(grad_ramp + pair * ITEMS + tl.program_id(0) // pairs, tl.sum(ramped, axis=0))
    slot = tl.load(item + 4)
    if HAS_SLOTS:
        own = (pair * SLOTS + tl.maximum(slot, 0)).to(tl.int64) * BLOCK + row
        in_part = slot + 0 * row >= 0
        tl.store(part + own[:, None] * BLOCK_D + d[None, :], acc, mask=in_part[:, None] & (d >= 0)[None, :])
    kept = (slot + 0 * row == -1) & real
    grads = grad_query + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h
    o_at = rows_at(grads, start, token, row, o_n, d, HAS_ORDER_Q)
    tl.store(o_at, acc.to(grad_query.dtype.element_ty), mask=kept[:, None] & (d < D)[None, :])


@triton.jit
def _add_key_gradients(
    grad_k, grad_v, k, v, token_k, segment, queries, grads, lse, delta, segments_q, rows, masks, bits, order_q, kind,
    places_q, reach, slope, limit, scale, first, end, N, D, DV, q_n, g_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER: tl.constexpr, HAS_RAMP: tl.constexpr,
    WIDE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Add what the entries [first, end) of a list give to the gradients of a block of keys: [keys, queries] tiles."""
    PARTS: tl.constexpr = BLOCK // STEP
    row, inside = tl.arange(0, BLOCK), tl.arange(0, STEP)
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    line = tl.load(rows + first)
    if CHECKED:
        number = tl.load(masks + first)
    for step in range(first * PARTS, end * PARTS):
        begin = step % PARTS * STEP
        start = line * BLOCK + begin
        line = tl.load(rows + (step + 1) // PARTS)
        token, real = tokens_at(order_q, kind, places_q, start + inside, N, HAS_ORDER)
        q_at = rows_at(queries, start, token, inside, q_n, d, HAS_ORDER)
        g_at = rows_at(grads, start, token, inside, g_n, dv, HAS_ORDER)
        q = load_rows(q_at, real, d, D, CHECKED, FULL_D, WIDE)
        g = load_rows(g_at, real, dv, DV, CHECKED, FULL_DV, WIDE)
        logs = _logs_at(lse, token, real, CHECKED)
        own_delta = numbers_at(delta, token, real, 0.0, CHECKED)
        s = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(s * scale - logs[None, :])
        if CHECKED:
            seen = bits_of(bits, number, row, begin + inside, BLOCK)
            number = tl.load(masks + (step + 1) // PARTS)
            if HAS_SEGMENTS:
                seen &= segment[:, None] == segments_at(segments_q, token, real, -3, True)[None, :]
            p = tl.where(seen, p, 0.0)
        elif HAS_SEGMENTS:
            own = segments_at(segments_q, token, real, -3, False)
            p = tl.where(segment[:, None] == own[None, :], p, 0.0)
        if HAS_RAMP:
            weight = weights_of(token_k, token, reach, slope, limit)
            p = tl.where(weight > 0.0, p, 0.0) * tl.minimum(weight, 1.0)
        grad_v += tl.dot(p.to(g.dtype), g, input_precision="ieee")
        inner = p * (tl.dot(v, tl.trans(g), input_precision="ieee") - own_delta[None, :])
        grad_k += tl.dot(inner.to(q.dtype), q, input_precision="ieee")
    return grad_k, grad_v


@triton.jit
def _key_kernel(
    query, key, value, segments_q, segments_k, heads, tables, items, rows, masks, bits, order_q, order_k, ramp,
    grad_out, lse, delta, grad_key, grad_value, part_k, part_v, scale, pairs, H, P, SHARE, N, M, D, DV, ITEMS, SLOTS,
    places_q, places_k, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, gk_b, gk_h, gk_n, gv_b, gv_h, gv_n,
    BLOCK: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, HAS_SEGMENTS: tl.constexpr, HAS_ORDER_Q: tl.constexpr, HAS_ORDER_K: tl.constexpr,
    HAS_SLOTS: tl.constexpr, HAS_RAMP: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """The gradients of one block of keys and values, over a list of query blocks, for some of the heads that read it.

    grad_key [B, P, M, D], grad_value [B, P, M, DV]: P is the number of key heads times ``SHARE``. ``items`` [T, ITEMS,
    8] with ``tables`` [P]; ``bits`` are transposed: [U, keys, words of queries]. ``part_k`` and ``part_v`` [pairs,
    SLOTS, BLOCK, BLOCK_D or BLOCK_DV] float32. ``pairs`` is B times P.
    """
    WIDE: tl.constexpr = MATH == FP32
    pair = tl.program_id(0) % pairs
    b, g = pair // P, pair % P
    group = H // P
    item = items + (tl.load(tables + g) * ITEMS + tl.program_id(0) // pairs) * ITEM
    block, first, middle, end = tl.load(item), tl.load(item + 1), tl.load(item + 2), tl.load(item + 3)
    start = tl.maximum(block, 0) * BLOCK
    first_head, end_head = g * group + tl.load(item + 5), g * group + tl.load(item + 6)
    kind = tl.load(heads + first_head)
    row, d, dv = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    token, real = tokens_at(order_k, kind, places_k, start + row, M, HAS_ORDER_K)
    kv = (g // SHARE).to(tl.int64)
    keys, values = key + b.to(tl.int64) * k_b + kv * k_h, value + b.to(tl.int64) * v_b + kv * v_h
    k = load_rows(rows_at(keys, start, token, row, k_n, d, HAS_ORDER_K), real, d, D, True, FULL_D, WIDE)
    v = load_rows(rows_at(values, start, token, row, v_n, dv, HAS_ORDER_K), real, dv, DV, True, FULL_DV, WIDE)
    segment = token
    if HAS_SEGMENTS:
        segment = segments_at(segments_k + b.to(tl.int64) * M, token, real, -2, True)
        segments_q += b.to(tl.int64) * N
    grad_k = tl.zeros((BLOCK, BLOCK_D), tl.float32)
    grad_v = tl.zeros((BLOCK, BLOCK_DV), tl.float32)
    for h in range(first_head, end_head):
        queries = query + b.to(tl.int64) * q_b + tl.cast(h, tl.int64) * q_h
        grads = grad_out + b.to(tl.int64) * g_b + tl.cast(h, tl.int64) * g_h
        of_head = (b.to(tl.int64) * H + h) * N
        reach, slope, limit = ramp_of(ramp, h, HAS_RAMP)
        grad_k, grad_v = _add_key_gradients(
            grad_k, grad_v, k, v, token, segment, queries, grads, lse + of_head, delta + of_head, segments_q, rows,
            masks, bits, order_q, kind, places_q, reach, slope, limit, scale * LOG2E, first, middle, N, D, DV, q_n, g_n,
            BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_Q, HAS_RAMP, WIDE, False,
        )  # fmt: skip
        grad_k, grad_v = _add_key_gradients(
            grad_k, grad_v, k, v, token, segment, queries, grads, lse + of_head, delta + of_head, segments_q, rows,
            masks, bits, order_q, kind, places_q, reach, slope, limit, scale * LOG2E, middle, end, N, D, DV, q_n, g_n,
            BLOCK, STEP, BLOCK_D, BLOCK_DV, FULL_D, FULL_DV, HAS_SEGMENTS, HAS_ORDER_Q, HAS_RAMP, WIDE, True,
        )  # fmt: skip
    grad_k *= scale
    slot = tl.load(item + 4)
    if HAS_SLOTS:
        own = (pair * SLOTS + tl.maximum(slot, 0)).to(tl.int64) * BLOCK + row
        in_part = slot + 0 * row >= 0
        tl.store(part_k + own[:, None] * BLOCK_D + d[None, :], grad_k, mask=in_part[:, None] & (d >= 0)[None, :])
        tl.store(part_v + own[:, None] * BLOCK_DV + dv[None, :], grad_v, mask=in_part[:, None] & (dv >= 0)[None, :])
    kept = (slot + 0 * row == -1) & real
    keys, values = grad_key + b.to(tl.int64) * gk_b, grad_value + b.to(tl.int64) * gv_b
    gk_at = rows_at(keys + g.to(tl.int64) * gk_h, start, token, row, gk_n, d, HAS_ORDER_K)
    gv_at = rows_at(values + g.to(tl.int64) * gv_h, start, token, row, gv_n, dv, HAS_ORDER_K)
    tl.store(gk_at, grad_k.to(grad_key.dtype.element_ty), mask=kept[:, None] & (d < D)[None, :])
    tl.store(gv_at, grad_v.to(grad_value.dtype.element_ty), mask=kept[:, None] & (dv < DV)[None, :])
