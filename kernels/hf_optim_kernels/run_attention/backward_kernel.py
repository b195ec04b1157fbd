"""Gradients of a block of queries, and of a block of keys and values; with weights of the log-sums of all rounds."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .parts import LN2, factors_at, in_run, keys_in_run, not_before, rows_of, through_unit, visible


@triton.jit
def _delta_kernel(
    grad_out, out, delta, H, N, DV, blocks, g_b, g_h, g_n, o_b, o_h, o_n, ROWS: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Write the sums of ``dO O`` of each token, [B, H, N]. Programs are (block of tokens, batch row and head)."""
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    n, dv = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    real = n < N
    slope = rows_of(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, n, real, g_n, dv, DV, False, True)
    result = rows_of(out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h, n, real, o_n, dv, DV, False, True)
    tl.store(delta + pair.to(tl.int64) * N + n, tl.sum(slope * result, axis=1), mask=real)


@triton.jit
def _query_kernel(
    query, key, value, order_q, order_k, low, high, codes, factors, lse, delta, grad_out, grad_query, scale, ALONE, H,
    G, HK, R,
    N, L, D, DV, r, before, after, blocks, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, x_h, l_h,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr, LAST: tl.constexpr,
    EARLIER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries; programs and arguments as of ``_forward_kernel``. ``lse`` and ``delta`` are of
    tokens, in steps of l_h for a head; ``grad_query`` has rows of tokens, in steps of x_h for a head, and what the
    EARLIER rounds gave.
    """
    WIDE: tl.constexpr = MATH == FP32
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    g = h // (H // G)
    row, inside, d, dv = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place = block * ROWS + row
    own = (pair * R + r).to(tl.int64) * L
    token = tl.load(order_q + own + place, mask=place < L, other=-1)
    real = token >= 0
    begin = tl.load(low + own + place, mask=real, other=0)
    end = tl.load(high + own + place, mask=real, other=-1)
    count = keys_in_run(begin, end, real, UNIT, LAST)
    q = rows_of(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, token, real, q_n, d, D, FULL_D, WIDE)
    slope = rows_of(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, token, real, g_n, dv, DV, FULL_DV, WIDE)
    logs = tl.load(lse + pair.to(tl.int64) * l_h + token, mask=real, other=float("-inf"))
    logs = tl.where(logs == float("-inf"), 0.0, logs)
    less = tl.load(delta + pair.to(tl.int64) * l_h + token, mask=real, other=0.0)
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    if UNIT:
        keys = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    places_k = order_k + ((b * HK + h // (H // HK)) * R + r).to(tl.int64) * L
    own_codes, own_factors = codes + (pair * R).to(tl.int64) * N, factors + pair.to(tl.int64) * N
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    if OWN:
        own_key = rows_of(keys, token, real, k_n, d, D, FULL_D, True)
        own_value = rows_of(values, token, real, v_n, dv, DV, FULL_DV, True)
        weight = tl.exp2(tl.sum(q.to(tl.float32) * own_key, axis=1) * scale - logs)
        acc += (weight * (tl.sum(slope.to(tl.float32) * own_value, axis=1) - less))[:, None] * own_key
    start = tl.min(tl.where(count > 0, begin, L), axis=0)
    stop = tl.max(tl.where(count > 0, begin + count, 0), axis=0)
    for at in range(start, stop, STEP):
        place_k = at + inside
        token_k = tl.load(places_k + place_k, mask=place_k < L, other=-1)
        there = token_k >= 0
        k = rows_of(keys, token_k, there, k_n, d, D, FULL_D, WIDE)
        v = rows_of(values, token_k, there, v_n, dv, DV, FULL_DV, WIDE)
        by = factors_at(own_factors, token_k, there, UNIT)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * (by * scale)[None, :]
        place_k = tl.where(there, place_k, -1)
        seen = visible(
            place_k[None, :], begin[:, None], count[:, None], token[:, None], token_k[None, :], CAUSAL, UNIT, LAST
        )
        if EARLIER > 0:
            seen = not_before(seen, own_codes, N, token, token_k, real, there, before, after, EARLIER, False)
        p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[:, None])
        inner = p * (tl.dot(slope, tl.trans(v), input_precision="ieee") - less[:, None])
        if UNIT:
            inner *= by[None, :]
        acc += tl.dot(inner.to(k.dtype), k, input_precision="ieee")
    to = grad_query + pair.to(tl.int64) * x_h + tl.maximum(token, 0).to(tl.int64)[:, None] * D + d[None, :]
    kept = real[:, None] & (d < D)[None, :]
    acc *= scale * LN2
    if EARLIER > 0:
        acc += tl.load(to, mask=kept, other=0.0).to(tl.float32)
    tl.store(to, acc.to(grad_query.dtype.element_ty), mask=kept)


@triton.jit
def _key_kernel(
    query, key, value, order_q, order_k, low, high, first, last, codes, factors, lse, delta, grad_out, grad_key,
    grad_value,
    scale, ALONE, H, G, HK, R, N, L, D, DV, r, before, after, blocks, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b,
    g_h, g_n, x_h, y_h, l_h,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr, LAST: tl.constexpr,
    EARLIER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of STEP keys and values by query head: queries from place ``first`` to ``last``, [B, H, R,
    L], may see a key. Rows of tiles are keys. With UNIT ``grad_key`` has the gradients of queries, to which those
    through their directions are added; else, as ``grad_value``, those of the EARLIER rounds.
    """
    WIDE: tl.constexpr = MATH == FP32
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    g = h // (H // G)
    row, inside, d, dv = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place_k = block * STEP + inside
    own = (pair * R + r).to(tl.int64) * L
    places_k = order_k + ((b * HK + h // (H // HK)) * R + r).to(tl.int64) * L
    token_k = tl.load(places_k + place_k, mask=place_k < L, other=-1)
    real = token_k >= 0
    begin = tl.load(first + own + place_k, mask=real, other=L)
    end = tl.load(last + own + place_k, mask=real, other=-1)
    queries = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    slopes = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    if UNIT:
        k = rows_of(queries, token_k, real, q_n, d, D, FULL_D, WIDE)
    else:
        k = rows_of(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h, token_k, real, k_n, d, D, FULL_D, WIDE)
    v = rows_of(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h, token_k, real, v_n, dv, DV, FULL_DV, WIDE)
    own_codes, own_factors = codes + (pair * R).to(tl.int64) * N, factors + pair.to(tl.int64) * N
    acc = tl.zeros((STEP, BLOCK_D), tl.float32)
    acc_v = tl.zeros((STEP, BLOCK_DV), tl.float32)
    by = factors_at(own_factors, token_k, real, UNIT)
    if OWN:
        asked = rows_of(queries, token_k, real, q_n, d, D, FULL_D, True)
        given = rows_of(slopes, token_k, real, g_n, dv, DV, FULL_DV, True)
        own_log = tl.load(lse + pair.to(tl.int64) * l_h + token_k, mask=real, other=0.0)
        own_less = tl.load(delta + pair.to(tl.int64) * l_h + token_k, mask=real, other=0.0)
        weight = tl.exp2(tl.sum(asked * k.to(tl.float32), axis=1) * scale - own_log)
        acc_v += weight[:, None] * given
        acc += (weight * (tl.sum(given * v.to(tl.float32), axis=1) - own_less))[:, None] * asked
    if UNIT and EARLIER == 0:  # keys of tokens that see themselves alone
        low_k = tl.load(low + own + place_k, mask=real, other=0)
        high_k = tl.load(high + own + place_k, mask=real, other=-1)
        own_log = tl.load(lse + pair.to(tl.int64) * l_h + token_k, mask=real, other=0.0)
        lone = real & (own_log < -0.5 * ALONE) & in_run(place_k, low_k, high_k - low_k + 1)
        acc_v += rows_of(slopes, token_k, lone, g_n, dv, DV, FULL_DV, True)
    held = tl.where(real, place_k, -1)
    start = tl.min(begin, axis=0)
    stop = tl.max(end, axis=0) + 1
    for at in range(start, stop, ROWS):
        place = at + row
        token = tl.load(order_q + own + place, mask=place < L, other=-1)
        there = token >= 0
        low_q = tl.load(low + own + place, mask=there, other=0)
        high_q = tl.load(high + own + place, mask=there, other=-1)
        count = keys_in_run(low_q, high_q, there, UNIT, LAST)
        q = rows_of(queries, token, there, q_n, d, D, FULL_D, WIDE)
        slope = rows_of(slopes, token, there, g_n, dv, DV, FULL_DV, WIDE)
        logs = tl.load(lse + pair.to(tl.int64) * l_h + token, mask=there, other=float("-inf"))
        logs = tl.where(logs == float("-inf"), 0.0, logs)
        less = tl.load(delta + pair.to(tl.int64) * l_h + token, mask=there, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * (by * scale)[:, None]
        seen = visible(
            held[:, None], low_q[None, :], count[None, :], token[None, :], token_k[:, None], CAUSAL, UNIT, LAST
        )
        if EARLIER > 0:
            seen = not_before(seen, own_codes, N, token, token_k, there, real, before, after, EARLIER, True)
        p = tl.exp2(tl.where(seen, s, float("-inf")) - logs[None, :])
        acc_v += tl.dot(p.to(slope.dtype), slope, input_precision="ieee")
        inner = p * (tl.dot(v, tl.trans(slope), input_precision="ieee") - less[None, :])
        acc += tl.dot(inner.to(q.dtype), q, input_precision="ieee")
    acc *= scale * LN2
    kept = real[:, None] & (d < D)[None, :]
    token_k = tl.maximum(token_k, 0).to(tl.int64)
    to = grad_key + pair.to(tl.int64) * x_h + token_k[:, None] * D + d[None, :]
    if UNIT:
        acc = through_unit(acc, k, by)
    if UNIT or EARLIER > 0:
        acc += tl.load(to, mask=kept, other=0.0).to(tl.float32)
    tl.store(to, acc.to(grad_key.dtype.element_ty), mask=kept)
    to, kept = (
        grad_value + pair.to(tl.int64) * y_h + token_k[:, None] * DV + dv[None, :],
        real[:, None] & (dv < DV)[None, :],
    )
    if EARLIER > 0:
        acc_v += tl.load(to, mask=kept, other=0.0).to(tl.float32)
    tl.store(to, acc_v.to(grad_value.dtype.element_ty), mask=kept)
