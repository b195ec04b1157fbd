"""A program attends from a block of places to the keys in their runs; rounds are merged by their log-sums."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .parts import factors_at, found_before, rows_of, scores_of, visible


@triton.jit
def _forward_kernel(
    query, key, value, order_q, order_k, low, high, codes, factors, out, lse, scale, ALONE, H, G, HK, R, N, L, D, DV, r,
    before, after, blocks, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_r, o_n, l_h,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, CAUSAL: tl.constexpr, UNIT: tl.constexpr, OWN: tl.constexpr, EARLIER: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Programs are (block of places, batch row and head) of round r; ``scale`` and ALONE include log2(e).

    ``order_q``, ``low`` and ``high`` are [B, H, R, L], ``order_k`` [B, HK, R, L], ``codes`` [B, H, R, N], and
    ``factors`` of unit keys [B, H, N]; out is [B, H, R, N, DV] by its strides, and ``lse`` [B, H, R, N], of base 2, in
    steps of l_h for a head.
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
    some = real & (end >= begin)
    start = tl.min(tl.where(some, begin, L), axis=0)
    stop = tl.max(tl.where(some, end + 1, 0), axis=0)
    for at in range(start, stop, STEP):
        place_k = at + inside
        token_k = tl.load(places_k + place_k, mask=place_k < L, other=-1)
        k = rows_of(keys, token_k, token_k >= 0, k_n, d, D, FULL_D, WIDE)
        by = factors_at(own_factors, token_k, token_k >= 0, UNIT) * scale
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * by[None, :]
        seen = visible(place_k[None, :], begin[:, None], end[:, None], token[:, None], token_k[None, :], CAUSAL)
        if EARLIER > 0:
            seen = seen & ~found_before(own_codes, N, token, token_k, real, token_k >= 0, before, after, EARLIER, False)
        s = scores_of(s, seen, token[:, None], token_k[None, :], ALONE, UNIT)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = rows_of(values, token_k, token_k >= 0, v_n, dv, DV, FULL_DV, WIDE)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    known = total > 0.0
    result = acc / tl.where(known, total, 1.0)[:, None]
    logs = tl.where(known, top + tl.log2(tl.where(known, total, 1.0)), float("-inf"))
    to = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + r * o_r
    to += tl.maximum(token, 0).to(tl.int64)[:, None] * o_n + dv[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    tl.store(lse + pair.to(tl.int64) * l_h + r * N + token, logs, mask=real)


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


@triton.jit
def _merge_kernel(
    parts, part_lse, out, lse, H, R, N, DV, blocks, o_b, o_h, o_n,
    ROWS: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Merge rounds [B, H, R, N, DV] by their lse, of base 2. Programs are (block of tokens, batch row and head)."""
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    n, dv = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_DV)
    own = (pair * R).to(tl.int64) * N
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    for r in range(0, R):
        top = tl.maximum(top, tl.load(part_lse + own + r * N + n, mask=n < N, other=float("-inf")))
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for r in range(0, R):
        weight = tl.exp2(tl.load(part_lse + own + r * N + n, mask=n < N, other=float("-inf")) - base)
        # Tokens without a place in a round have no row there.
        there = (weight > 0.0)[:, None] & (dv < DV)[None, :]
        acc += weight[:, None] * tl.load(parts + (own + r * N + n)[:, None] * DV + dv[None, :], mask=there, other=0.0)
        total += weight
    known = total > 0.0
    result = acc / tl.where(known, total, 1.0)[:, None]
    to = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + n.to(tl.int64)[:, None] * o_n + dv[None, :]
    tl.store(to, result.to(out.dtype.element_ty), mask=(n < N)[:, None] & (dv < DV)[None, :])
    logs = tl.where(known, top + tl.log2(tl.where(known, total, 1.0)), float("-inf"))
    tl.store(lse + pair.to(tl.int64) * N + n, logs, mask=n < N)
