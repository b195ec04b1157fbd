"""The backward of keys: gradients of a chunk of keys and values, from the queries after it and those of the chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .backward_kernel import add_slopes, columns_of, numbers_of
from .output_kernel import state_rows
from .parts import (
    LOG2E,
    factors_of,
    features_of,
    finite,
    keys_of,
    length_of,
    operand,
    rows_at,
    through,
    weight_rows,
)


@triton.jit
def _of_states(first, second, v, parts, sums, row, m, f, dv, DV, later, TRIG: tl.constexpr, HALF: tl.constexpr,
               PRECISION: tl.constexpr):  # fmt: skip
    """Return the gradients of features of keys, and of values, through the states of queries after the chunk."""
    held = state_rows(parts, row, f < m, dv, DV, HALF)
    by_first = tl.dot(v, tl.trans(held), input_precision=PRECISION)
    by_first += tl.load(sums + row, mask=f < m, other=0.0)[None, :]
    by_first *= later[:, None]
    by_second = by_first
    acc_v = tl.dot(operand(first, HALF), held, input_precision=PRECISION)
    if TRIG:
        held = state_rows(parts, row + m, f < m, dv, DV, HALF)
        by_second = tl.dot(v, tl.trans(held), input_precision=PRECISION)
        by_second += tl.load(sums + row + m, mask=f < m, other=0.0)[None, :]
        by_second *= later[:, None]
        acc_v += tl.dot(operand(second, HALF), held, input_precision=PRECISION)
    return by_first, by_second, acc_v * later[:, None]


@triton.jit
def _factors_of(log, decay, log_q, n):
    """Return what products of features of a chunk are multiplied with, [queries, keys]."""
    seen = n[None, :] <= n[:, None]
    return tl.exp2(tl.where(seen, (log - decay)[None, :] + (decay - log_q)[:, None], float("-inf")))


@triton.jit
def _key_kernel(
    query, key, value, weight, mask, gates, tops_k, tops, logs, delta, grad_out, parts, sums, references, grad_key,
    grad_value, flows, columns, root, half, eps, share, root_e, scale, T, H, P, G, M, D, DV, m, w_h,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, x_b, x_h, x_n, y_b, y_h, y_n,
    C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, HAS_COLUMNS: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """Programs are (chunk, batch row and state head), whose query heads are added up. ``parts`` and ``sums`` are the
    states of the queries after each chunk (not CAUSAL: of all). ``flows`` [B P, M] and ``columns``
    [B P, T, D] as of ``_query_kernel``. SINGLE: there is one block of features.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, p = pair // P, pair % P
    g = p // (P // G)
    group = H // P
    n, d, dv = t * C + tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = n < M
    y = rows_at(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h, n, real, k_n, d, D, HALF)
    v = rows_at(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h, n, real, v_n, dv, DV, HALF)
    weights = weight + p * w_h
    length = length_of(y)
    factor_k, norm_k = factors_of(length, root, half, eps, NORMED)
    log, top_k, decay, whole = keys_of(tops_k, gates, mask, pair, b, n, M, TRIG, HAS_GATE, HAS_MASK)
    own, F = pair.to(tl.int64), m
    if TRIG:
        F = 2 * m
    if CAUSAL:
        own = own * T + t
    reference = tl.load(references + own)
    if not CAUSAL:
        reference *= LOG2E
    later = tl.exp2(log + whole - decay + finite(reference))
    acc = tl.zeros((C, BLOCK_D), tl.float32)
    acc_v = tl.zeros((C, BLOCK_DV), tl.float32)
    total, flow = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    if SINGLE:  # features are made once
        f = tl.arange(0, BLOCK_F)
        w = weight_rows(weights, f, d, m, D)
        row = own * F + f
        first_k, second_k = features_of(y, factor_k, norm_k, top_k, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
        by_first, by_second, acc_v = _of_states(
            first_k, second_k, v, parts, sums, row, m, f, dv, DV, later, TRIG, HALF, PRECISION
        )
        if CAUSAL:
            for each in range(0, group):
                h = p * group + each
                at = (b * H + h).to(tl.int64) * M + n
                x = rows_at(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, real, q_n, d, D, HALF)
                slope = rows_at(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, n, real, g_n, dv, DV, HALF)
                factor, norm = factors_of(length_of(x), root, half, eps, NORMED)
                top, log_q, less = numbers_of(tops, logs, delta, at, n, real, TRIG)
                first, second = features_of(x, factor, norm, top, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
                q = operand(first, HALF)
                products = tl.dot(q, tl.trans(operand(first_k, HALF)), input_precision=PRECISION)
                if TRIG:
                    q_2 = operand(second, HALF)
                    products += tl.dot(q_2, tl.trans(operand(second_k, HALF)), input_precision=PRECISION)
                factors = _factors_of(log, decay, log_q, n)
                inner = tl.dot(slope, tl.trans(v), input_precision=PRECISION) + less[:, None]
                inner = tl.trans(operand(inner * factors, HALF))
                acc_v += tl.dot(tl.trans(operand(products * factors, HALF)), slope, input_precision=PRECISION)
                by_first += tl.dot(inner, q, input_precision=PRECISION)
                if TRIG:
                    by_second += tl.dot(inner, q_2, input_precision=PRECISION)
        if not TRIG:
            by_second = by_first
        acc, total, flow = add_slopes(
            acc, total, flow, by_first, by_second, first_k, second_k, w, TRIG, HAS_GATE, HALF, PRECISION
        )
    else:
        for start in range(0, m, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            w = weight_rows(weights, f, d, m, D)
            row = own * F + f
            first, second = features_of(y, factor_k, norm_k, top_k, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
            by_first, by_second, added = _of_states(
                first, second, v, parts, sums, row, m, f, dv, DV, later, TRIG, HALF, PRECISION
            )
            acc_v += added
            acc, total, flow = add_slopes(
                acc, total, flow, by_first, by_second, first, second, w, TRIG, HAS_GATE, HALF, PRECISION
            )
        if CAUSAL:
            for each in range(0, group):
                h = p * group + each
                at = (b * H + h).to(tl.int64) * M + n
                x = rows_at(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, real, q_n, d, D, HALF)
                slope = rows_at(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, n, real, g_n, dv, DV, HALF)
                factor, norm = factors_of(length_of(x), root, half, eps, NORMED)
                top, log_q, less = numbers_of(tops, logs, delta, at, n, real, TRIG)
                products = tl.zeros((C, C), tl.float32)
                for start in range(0, m, BLOCK_F):
                    f = start + tl.arange(0, BLOCK_F)
                    w = weight_rows(weights, f, d, m, D)
                    first, second = features_of(x, factor, norm, top, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
                    first_k, second_k = features_of(
                        y, factor_k, norm_k, top_k, w, f, m, share, TRIG, SPLIT, HALF, EXACT
                    )
                    products += tl.dot(
                        operand(first, HALF), tl.trans(operand(first_k, HALF)), input_precision=PRECISION
                    )
                    if TRIG:
                        products += tl.dot(
                            operand(second, HALF), tl.trans(operand(second_k, HALF)), input_precision=PRECISION
                        )
                factors = _factors_of(log, decay, log_q, n)
                inner = tl.dot(slope, tl.trans(v), input_precision=PRECISION) + less[:, None]
                inner = tl.trans(operand(inner * factors, HALF))
                acc_v += tl.dot(tl.trans(operand(products * factors, HALF)), slope, input_precision=PRECISION)
                for start in range(0, m, BLOCK_F):
                    f = start + tl.arange(0, BLOCK_F)
                    w = weight_rows(weights, f, d, m, D)
                    first, second = features_of(x, factor, norm, top, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
                    first_k, second_k = features_of(
                        y, factor_k, norm_k, top_k, w, f, m, share, TRIG, SPLIT, HALF, EXACT
                    )
                    by_first = tl.dot(inner, operand(first, HALF), input_precision=PRECISION)
                    by_second = by_first
                    if TRIG:
                        by_second = tl.dot(inner, operand(second, HALF), input_precision=PRECISION)
                    acc, total, flow = add_slopes(
                        acc, total, flow, by_first, by_second, first_k, second_k, w, TRIG, HAS_GATE, HALF, PRECISION
                    )
    if HAS_COLUMNS:
        columns_of(acc, y, length, root_e, eps, columns + (pair.to(tl.int64) * T + t) * D, d, D, NORMED)
    found = through(acc, total, y, length, root_e, scale, eps, NORMED, TRIG)
    where = grad_key + b.to(tl.int64) * x_b + p.to(tl.int64) * x_h + n.to(tl.int64)[:, None] * x_n + d[None, :]
    tl.store(where, found.to(grad_key.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    where = grad_value + b.to(tl.int64) * y_b + p.to(tl.int64) * y_h + n.to(tl.int64)[:, None] * y_n + dv[None, :]
    tl.store(where, acc_v.to(grad_value.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])
    if HAS_GATE:
        tl.store(flows + pair.to(tl.int64) * M + n, flow, mask=real)
