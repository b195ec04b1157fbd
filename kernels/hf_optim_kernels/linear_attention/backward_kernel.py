"""The backward: gradients of a chunk of queries, of a chunk of keys and values, and of gates.

As in the forward, pairs within a chunk are computed one by one, and all others through a state: gradients of queries
through the sums of the keys before them, gradients of keys through the sums of the queries after them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .output_kernel import state_rows
from .parts import (
    LOG2E,
    factors_of,
    features_of,
    finite,
    keys_of,
    length_of,
    operand,
    rest_of,
    rows_at,
    through,
    weight_rows,
)


@triton.jit
def angle_slope(by_first, by_second, first, second, TRIG: tl.constexpr):
    """Return the gradients of exponents (or angles) for those of features, relative to them."""
    if TRIG:  # noqa: SIM108 - one of the two is compiled
        found = by_first * second - by_second * first
    else:
        found = by_first * first
    return found


@triton.jit
def add_slopes(
    acc, total, flow, by_first, by_second, first, second, w, TRIG: tl.constexpr, HAS_GATE: tl.constexpr,
    HALF: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the sums of a row with what the gradients of features ``first`` and ``second`` add: the gradient of its
    products with W, times W; the sum of that of its exponents; and of logarithms of weights, with gates.
    """
    turned = angle_slope(by_first, by_second, first, second, TRIG)
    if HAS_GATE:
        if TRIG:
            flow += tl.sum(by_first * first + by_second * second, axis=1)
        else:
            flow += tl.sum(turned, axis=1)
    total += tl.sum(turned, axis=1)
    acc += tl.dot(operand(turned, HALF), operand(w, HALF), input_precision=PRECISION)
    return acc, total, flow


@triton.jit
def numbers_of(tops, logs, delta, at, n, real, TRIG: tl.constexpr):
    """Return of each query, at ``at``: the top of its features, log2 of its denominator, and what its slopes lose."""
    top = n * 0.0
    if not TRIG:
        top = tl.load(tops + at, mask=real, other=0.0)
    log_q = tl.load(logs + at, mask=real, other=float("inf"))
    less = tl.load(delta + at, mask=real, other=0.0)
    return top, log_q, less


@triton.jit
def columns_of(slope, x, length, root, eps, to, d, D, NORMED: tl.constexpr):
    """Store the sums over rows of ``slope x``, of vectors x as they are multiplied with W."""
    by = length * 0.0 + root
    if NORMED:
        by = root / (length + eps)
    tl.store(to + d, tl.sum(slope * x.to(tl.float32) * by[:, None], axis=0), mask=d < D)


@triton.jit
def _query_kernel(
    query, key, value, weight, mask, gates, tops_k, tops, logs, delta, grad_out, parts, sums, references, grad_query,
    flows, columns, root, half, eps, share, root_e, scale, T, H, P, G, N, D, DV, m, w_h,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n, x_b, x_h, x_n,
    C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr, CAUSAL: tl.constexpr, HAS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Programs are (chunk, batch row and query head); states as of ``_output_kernel``. ``flows`` [B H, N] gets, with
    gates, the sum over keys of the gradients of the logarithms of weights. ``columns`` [B H, T, D] gets the gradients
    of the logarithms of what columns of W are multiplied with.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, h = pair // H, pair % H
    p = h // (H // P)
    n, d, dv = t * C + tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = n < N
    x = rows_at(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, real, q_n, d, D, HALF)
    slope = rows_at(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, n, real, g_n, dv, DV, HALF)
    weights = weight + p * w_h
    length = length_of(x)
    factor, norm = factors_of(length, root, half, eps, NORMED)
    at = pair.to(tl.int64) * N + n
    top, log_q, less = numbers_of(tops, logs, delta, at, n, real, TRIG)
    own, F = (b * P + p).to(tl.int64), m
    if TRIG:
        F = 2 * m
    if CAUSAL:
        own = own * T + t
    reference = 0.0
    if not TRIG:
        reference = tl.load(references + own)
        if not CAUSAL:
            reference *= LOG2E
    past = reference - log_q
    if CAUSAL:
        g = p // (P // G)
        y = rows_at(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h, n, real, k_n, d, D, HALF)
        v = rows_at(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h, n, real, v_n, dv, DV, HALF)
        factor_k, norm_k = factors_of(length_of(y), root, half, eps, NORMED)
        log, top_k, decay, _whole = keys_of(tops_k, gates, mask, b * P + p, b, n, N, TRIG, HAS_GATE, HAS_MASK)
        seen = n[None, :] <= n[:, None]
        factors = tl.where(seen, (log - decay)[None, :] + (decay - log_q)[:, None], float("-inf"))
        inner = tl.dot(slope, tl.trans(v), input_precision=PRECISION) + less[:, None]
        inner = operand(inner * tl.exp2(factors), HALF)
        past += decay
    past = tl.exp2(past)
    acc = tl.zeros((C, BLOCK_D), tl.float32)
    total, flow = tl.zeros((C,), tl.float32), tl.zeros((C,), tl.float32)
    for start in range(0, m, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        w = weight_rows(weights, f, d, m, D)
        row = own * F + f
        first, second = features_of(x, factor, norm, top, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
        held = state_rows(parts, row, f < m, dv, DV, HALF)
        by_first = tl.dot(slope, tl.trans(held), input_precision=PRECISION)
        by_first += less[:, None] * tl.load(sums + row, mask=f < m, other=0.0)[None, :]
        by_first *= past[:, None]
        by_second = by_first
        if TRIG:
            held = state_rows(parts, row + m, f < m, dv, DV, HALF)
            by_second = tl.dot(slope, tl.trans(held), input_precision=PRECISION)
            by_second += less[:, None] * tl.load(sums + row + m, mask=f < m, other=0.0)[None, :]
            by_second *= past[:, None]
        if CAUSAL:
            first_k, second_k = features_of(y, factor_k, norm_k, top_k, w, f, m, share, TRIG, SPLIT, HALF, EXACT)
            by_first += tl.dot(inner, operand(first_k, HALF), input_precision=PRECISION)
            if TRIG:
                by_second += tl.dot(inner, operand(second_k, HALF), input_precision=PRECISION)
        acc, total, flow = add_slopes(
            acc, total, flow, by_first, by_second, first, second, w, TRIG, HAS_GATE, HALF, PRECISION
        )
    if HAS_COLUMNS:
        columns_of(acc, x, length, root_e, eps, columns + (pair.to(tl.int64) * T + t) * D, d, D, NORMED)
    found = through(acc, total, x, length, root_e, scale, eps, NORMED, TRIG)
    where = grad_query + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + n.to(tl.int64)[:, None] * x_n + d[None, :]
    tl.store(where, found.to(grad_query.dtype.element_ty), mask=real[:, None] & (d < D)[None, :])
    if HAS_GATE:
        tl.store(flows + at, flow, mask=real)


@triton.jit
def _gate_kernel(
    gates, mask, flows_q, flows_k, parts, sums, references, later, later_sums, later_references, grad_gate, T, H, P, N,
    SIZE, F,
    C: tl.constexpr, BLOCK: tl.constexpr, HAS_MASK: tl.constexpr, FREE: tl.constexpr,
):  # fmt: skip
    """Gradients of the logarithms of a chunk of gates, [B P, N].

    A gate multiplies the weights of all pairs of an earlier key and a query from it on. Those of a query after the
    chunk are the product of the states at its end, ``parts`` before the next chunk and ``later`` after this one; the
    others follow from the sums by query and by key within the chunk.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, p = pair // P, pair % P
    at = pair.to(tl.int64) * T + t
    flow = 0.0
    if t + 1 < T:
        acc = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, SIZE, BLOCK):
            e = start + tl.arange(0, BLOCK)
            one = tl.load(parts + (at + 1) * SIZE + e, mask=e < SIZE, other=0.0).to(tl.float32)
            acc += one * tl.load(later + at * SIZE + e, mask=e < SIZE, other=0.0).to(tl.float32)
        for start in range(0, F, BLOCK):
            e = start + tl.arange(0, BLOCK)
            one = tl.load(sums + (at + 1) * F + e, mask=e < F, other=0.0)
            acc += one * tl.load(later_sums + at * F + e, mask=e < F, other=0.0)
        reference = finite(tl.load(later_references + at))
        if FREE:
            reference += finite(tl.load(references + at + 1))
        flow = tl.sum(acc, axis=0) * tl.exp2(reference)
    n = t * C + tl.arange(0, C)
    real = n < N
    seen = real
    if HAS_MASK:
        seen = tl.load(mask + b.to(tl.int64) * N + n, mask=real, other=0) != 0
    group = H // P
    rows = tl.zeros((C,), tl.float32)
    for each in range(0, group):
        rows += tl.load(flows_q + (b * H + p * group + each).to(tl.int64) * N + n, mask=real, other=0.0)
    own = pair.to(tl.int64) * N + n
    columns = tl.load(flows_k + own, mask=real, other=0.0)
    gate = tl.load(gates + own, mask=seen, other=-1.0).to(tl.float32)
    less = rows - columns
    rest = tl.sum(less, axis=0) - tl.cumsum(less, axis=0) + less
    found = flow + rest - columns * tl.exp(gate) / rest_of(gate)
    tl.store(grad_gate + own, tl.where(seen, found, 0.0).to(grad_gate.dtype.element_ty), mask=real)
