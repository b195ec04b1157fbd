"""A program attends from a block of places to the keys in their runs, and adds what earlier rounds have found."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .parts import in_run, keys_in_run, not_before, rows_of, visible


@triton.jit
def _forward_kernel(
    query, key, value, order_q, order_k, low, high, codes, factors, out, lse, scale, ALONE, H, G, HK, R, N, L, D, DV, r,
    before, after, blocks, near, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n, l_h,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr, LAST: tl.constexpr,
    NEAR: tl.constexpr, EARLIER: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Programs are (block of places, batch row and head) of round r; ``scale`` and ALONE include log2(e).

    ``order_q``, ``low`` and ``high`` are [B, H, R, L], ``order_k`` [B, HK, R, L], ``codes`` [B, H, R, N], and
    ``factors`` of unit keys [B, H, N]; out is [B, H, N, DV] by its strides, and ``lse`` [B, H, N], of base 2, in steps
    of l_h for a head. With EARLIER rounds both have their results, which the own ones are merged with: a round is a
    launch, and out stays in the cache between two of them. NEAR: the first ``near`` tokens are computed
    in the first round alone, in blocks of their own behind the others, whose places are the tokens.
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
    first = block * ROWS >= L  # a block of near tokens
    if NEAR and EARLIER == 0:
        place = tl.where(first, place - tl.cdiv(L, ROWS) * ROWS, place)
        token = tl.where(first, tl.where(place < near, place, -1), token)
        real = token >= 0
        begin = tl.where(first, 0, begin)
        end = tl.where(first, tl.where(real, place, -1), end)
    count = keys_in_run(begin, end, real, UNIT, LAST)
    q = rows_of(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, token, real, q_n, d, D, FULL_D, WIDE)
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    if UNIT:
        keys = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    places_k = order_k + ((b * HK + h // (H // HK)) * R + r).to(tl.int64) * L
    own_codes, own_factors = codes + (pair * R).to(tl.int64) * N, factors + pair.to(tl.int64) * N
    if OWN:
        itself = rows_of(keys, token, real, k_n, d, D, FULL_D, True)
        top = tl.where(real, tl.sum(q.to(tl.float32) * itself, axis=1) * scale, float("-inf"))
        total = real.to(tl.float32)
        acc = rows_of(values, token, real, v_n, dv, DV, FULL_DV, True)
    else:
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        total = tl.zeros((ROWS,), tl.float32)
        acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    start = tl.min(tl.where(count > 0, begin, L), axis=0)
    stop = tl.max(tl.where(count > 0, begin + count, 0), axis=0)
    for at in range(start, stop, STEP):
        place_k = at + inside
        token_k = tl.load(places_k + place_k, mask=place_k < L, other=-1)
        if NEAR and EARLIER == 0:
            token_k = tl.where(first, tl.where(place_k < L, place_k, -1), token_k)
        there = token_k >= 0
        k = rows_of(keys, token_k, there, k_n, d, D, FULL_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if UNIT:
            s *= (tl.load(own_factors + token_k, mask=there, other=0.0) * scale)[None, :]
        else:
            s *= scale
        place_k = tl.where(there, place_k, -1)
        seen = visible(
            place_k[None, :], begin[:, None], count[:, None], token[:, None], token_k[None, :], CAUSAL, UNIT, LAST
        )
        if EARLIER > 0:
            seen = not_before(seen, own_codes, N, token, token_k, real, there, before, after, EARLIER, False)
        s = tl.where(seen, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = rows_of(values, token_k, there, v_n, dv, DV, FULL_DV, WIDE)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    known = total > 0.0
    result = acc / tl.where(known, total, 1.0)[:, None]
    logs = tl.where(known, top + tl.log2(tl.where(known, total, 1.0)), float("-inf"))
    if UNIT and EARLIER == 0:  # a token that sees itself alone; beside any other key its score is too low to count
        lone = ~known & (end >= begin)
        if not LAST:
            lone = lone & in_run(place, begin, count)
        itself = rows_of(values, token, lone & real, v_n, dv, DV, FULL_DV, True)
        result = tl.where(lone[:, None], itself, result)
        logs = tl.where(lone, -ALONE, logs)
    to = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h
    to += tl.maximum(token, 0).to(tl.int64)[:, None] * o_n + dv[None, :]
    if NEAR:
        real = real & (token >= tl.where(first, 0, near))
    to_lse, kept = lse + pair.to(tl.int64) * l_h + token, real[:, None] & (dv < DV)[None, :]
    if EARLIER > 0:
        past = tl.load(to_lse, mask=real, other=float("-inf"))
        most = tl.maximum(past, logs)
        most = tl.where(most == float("-inf"), 0.0, most)
        share_past, share = tl.exp2(past - most), tl.exp2(logs - most)
        total = share_past + share
        some = total > 0.0
        total = tl.where(some, total, 1.0)
        by = 1.0 / total
        result *= (share * by)[:, None]
        result += tl.load(to, mask=kept, other=0.0).to(tl.float32) * (share_past * by)[:, None]
        logs = tl.where(some, most + tl.log2(total), float("-inf"))
    tl.store(to, result.to(out.dtype.element_ty), mask=kept)
    tl.store(to_lse, logs, mask=real)


@triton.jit
def _factor_kernel(
    query, factors, H, N, D, blocks, q_b, q_h, q_n, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, FULL_D: tl.constexpr
):
    """Write what queries are multiplied with to be of unit length, [B, H, N]. Programs are (block, row and head)."""
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    n, d = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    x = rows_of(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, n < N, q_n, d, D, FULL_D, True)
    mean = tl.sum(x * x, axis=1) / D + 1e-6
    tl.store(factors + pair.to(tl.int64) * N + n, 1.0 / tl.sqrt(mean * D), mask=n < N)
