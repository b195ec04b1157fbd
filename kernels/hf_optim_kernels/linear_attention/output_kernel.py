"""The output of a chunk of queries: from the state before it, and from the keys of the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import LOG2E, exponents, factors_of, features, finite, keys_of, length_of, operand, rows_at, weight_rows


@triton.jit
def state_rows(parts, row, real, dv, DV, HALF: tl.constexpr):
    """Return rows of a state [BLOCK_F, BLOCK_DV] as an operand."""
    found = tl.load(parts + row[:, None] * DV + dv[None, :], mask=real[:, None] & (dv < DV)[None, :], other=0.0)
    return operand(found, HALF)


@triton.jit
def _output_kernel(
    query, key, value, weight, mask, gates, amounts, tops_k, parts, sums, references, out, tops, logs, root, half, eps,
    share, floor, T, H, P, G, N, D, DV, m, w_h, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, HAS_AMOUNTS: tl.constexpr,
):  # fmt: skip
    """Programs are (chunk, batch row and query head). ``parts`` and ``sums`` are states before each chunk, with their
    ``references`` to base 2; not CAUSAL: the state of all keys, with natural logarithms. ``tops`` and ``logs`` [B H, N]
    get the largest exponent of each query and log2 of its denominator (+inf: replaced). TRIG: ``tops`` is 1 where it
    was replaced, by ``floor`` times ``amounts`` [B P, N], and ``logs`` has that of what was divided by.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, h = pair // H, pair % H
    p = h // (H // P)
    n, d, dv = t * C + tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = n < N
    x = rows_at(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, real, q_n, d, D, HALF)
    weights = weight + p * w_h
    factor, norm = factors_of(length_of(x), root, half, eps, NORMED)
    top = n * 0.0
    if not TRIG:
        top += float("-inf")
        for start in range(0, m, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            w = weight_rows(weights, f, d, m, D)
            a = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
            top = tl.maximum(top, tl.max(a, axis=1))
        tl.store(tops + pair.to(tl.int64) * N + n, top, mask=real)
    own, F = (b * P + p).to(tl.int64), m
    if TRIG:
        F = 2 * m
    if CAUSAL:
        own = own * T + t
        g = p // (P // G)
        y = rows_at(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h, n, real, k_n, d, D, HALF)
        factor_k, norm_k = factors_of(length_of(y), root, half, eps, NORMED)
        log, top_k, decay, _whole = keys_of(tops_k, gates, mask, b * P + p, b, n, N, TRIG, HAS_GATE, HAS_MASK)
        products = tl.zeros((C, C), tl.float32)
    reference = 0.0
    if not TRIG:
        reference = tl.load(references + own)
        if not CAUSAL:
            reference *= LOG2E
    acc = tl.zeros((C, BLOCK_DV), tl.float32)
    total = tl.zeros((C,), tl.float32)
    for start in range(0, m, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        w = weight_rows(weights, f, d, m, D)
        row = own * F + f
        a = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
        first, second = features(a, top, f, m, share, TRIG)
        q = operand(first, HALF)
        acc += tl.dot(q, state_rows(parts, row, f < m, dv, DV, HALF), input_precision=PRECISION)
        total += tl.sum(first * tl.load(sums + row, mask=f < m, other=0.0)[None, :], axis=1)
        if TRIG:
            q_2 = operand(second, HALF)
            acc += tl.dot(q_2, state_rows(parts, row + m, f < m, dv, DV, HALF), input_precision=PRECISION)
            total += tl.sum(second * tl.load(sums + row + m, mask=f < m, other=0.0)[None, :], axis=1)
        if CAUSAL:
            a = exponents(y, factor_k, norm_k, w, f, m, TRIG, SPLIT, HALF, EXACT)
            first, second = features(a, top_k, f, m, share, TRIG)
            products += tl.dot(q, tl.trans(operand(first, HALF)), input_precision=PRECISION)
            if TRIG:
                products += tl.dot(q_2, tl.trans(operand(second, HALF)), input_precision=PRECISION)
    base = n * 0.0 + reference
    if CAUSAL:
        v = rows_at(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h, n, real, v_n, dv, DV, HALF)
        factors = tl.where(n[None, :] <= n[:, None], (log - decay)[None, :] + decay[:, None], float("-inf"))
        past = reference + decay
        base = tl.zeros((C,), tl.float32)
        if not TRIG:
            base = finite(tl.maximum(past, tl.max(factors, axis=1)))
        products = products * tl.exp2(factors - base[:, None])
        shrink = tl.exp2(past - base)
        acc = acc * shrink[:, None] + tl.dot(operand(products, HALF), v, input_precision=PRECISION)
        total = total * shrink + tl.sum(products, axis=1)
    least = floor + n * 0.0
    if HAS_AMOUNTS:
        least *= tl.load(amounts + (b * P + p).to(tl.int64) * N + n, mask=real, other=1.0)
    free = total > least
    if TRIG:
        below = tl.where(free, total, least)
        acc = acc / below[:, None]
        result = tl.log2(below)
        tl.store(tops + pair.to(tl.int64) * N + n, tl.where(free, 0.0, 1.0), mask=real)
    else:
        acc = tl.where(free[:, None], acc / tl.where(free, total, 1.0)[:, None], 0.0)
        result = tl.where(free, base + tl.log2(tl.where(free, total, 1.0)), float("inf"))
    tl.store(logs + pair.to(tl.int64) * N + n, result, mask=real)
    at = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + n.to(tl.int64)[:, None] * o_n + dv[None, :]
    tl.store(at, acc.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
