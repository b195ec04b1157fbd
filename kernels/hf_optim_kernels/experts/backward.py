"""Kernels of the backward of a mixture layer, beside the grouped products of ``grouped``.

Rows stand in the order of the route, so that those of an expert follow each other. Nothing is added by atomic
operations: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .activation import CONCATENATED, GELU, GELU_TANH, RELU, SILU, UNGATED, activate


@triton.jit
def _slope(x, alpha, ACT: tl.constexpr):
    """Return the derivative of ``activation.activate``, float32."""
    if ACT == SILU:
        s = 1.0 / (1.0 + tl.exp(-alpha * x))
        y = s * (1.0 + alpha * x * (1.0 - s))
    elif ACT == GELU:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == GELU_TANH:
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        t = 1.0 - 2.0 / (tl.exp(2.0 * z) + 1.0)
        y = 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * 0.7978845608028654 * (1.0 + 0.134145 * x * x)
    elif ACT == RELU:
        y = tl.where(x > 0.0, 1.0, 0.0)
    else:
        y = tl.where(x > 0.0, 2.0 * x, 0.0)
    return y


@triton.jit
def _halves(at, column, N, LAYOUT: tl.constexpr):
    """Return where the gate and up of columns of the activation are in a row of the first product."""
    if LAYOUT == CONCATENATED:
        first, second = at + column, at + N + column
    elif LAYOUT == UNGATED:
        first, second = at + column, at + column
    else:
        first, second = at + 2 * column, at + 2 * column + 1
    return first, second


@triton.jit
def _parts(rows, at, column, mask, N, limit, LAYOUT: tl.constexpr, CLAMP: tl.constexpr):
    """Return gate and up, float32 and within bounds, and whether each was within them before; NaN was, and stays."""
    where_first, where_up = _halves(at, column, N, LAYOUT)
    first = tl.load(rows + where_first, mask=mask, other=0.0).to(tl.float32)
    up = first
    if LAYOUT != UNGATED:
        up = tl.load(rows + where_up, mask=mask, other=0.0).to(tl.float32)
    kept, bounded = mask, mask
    if CLAMP:
        kept, bounded = (first > limit) == 0, ((up > limit) | (up < -limit)) == 0
        first = tl.where(first > limit, limit, first)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return first, up, kept, bounded


@triton.jit
def _activate_kernel(
    rows, out, offsets, alpha, offset, limit, E, N, LAYOUT: tl.constexpr, ACT: tl.constexpr,
    CLAMP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Compute the activation out [rows, N] of each row of the first product; programs are (row, tile of columns)."""
    row = tl.program_id(0)
    if row < tl.load(offsets + E):
        column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
        width = N if LAYOUT == UNGATED else 2 * N
        first, up, _kept, _bounded = _parts(rows, row.to(tl.int64) * width, column, column < N, N, limit, LAYOUT, CLAMP)
        y = activate(first, alpha, ACT)
        if LAYOUT != UNGATED:
            y = y * (up + offset)
        tl.store(out + row.to(tl.int64) * N + column, y.to(out.dtype.element_ty), mask=column < N)


@triton.jit
def _activate_grad_kernel(
    rows, grad, weights, order, offsets, d_rows, scaled, d_weights, alpha, offset, limit, E, N,
    LAYOUT: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, SCALED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Go back through the activation, one program for each row.

    Args:
        rows: [rows, 2 N] ([rows, N]), the first product.
        grad: [rows, N], of the activation, before the pair's weight.
        weights: [pairs].
        d_rows: like ``rows``; its gradient.
        scaled: [rows, N], the activation times the pair's weight, written with SCALED.
        d_weights: float32 [pairs], the sum of grad times activation; 0 of pairs that no expert computes.
    """
    row = tl.program_id(0)
    pair = tl.load(order + row)
    total = tl.zeros((BLOCK_N,), tl.float32)
    if row < tl.load(offsets + E):
        share = tl.load(weights + pair).to(tl.float32)
        width = N if LAYOUT == UNGATED else 2 * N
        at, own = row.to(tl.int64) * width, row.to(tl.int64) * N
        for start in range(0, N, BLOCK_N):
            column = start + tl.arange(0, BLOCK_N)
            mask = column < N
            first, up, kept, bounded = _parts(rows, at, column, mask, N, limit, LAYOUT, CLAMP)
            u = tl.load(grad + own + column, mask=mask, other=0.0).to(tl.float32)
            act, slope = activate(first, alpha, ACT), _slope(first, alpha, ACT)
            where_first, where_up = _halves(at, column, N, LAYOUT)
            if LAYOUT == UNGATED:
                value, d_first = act, share * u * slope
            else:
                value, d_first = act * (up + offset), share * u * (up + offset) * slope
                d_up = tl.where(bounded, share * u * act, 0.0)
                tl.store(d_rows + where_up, d_up.to(d_rows.dtype.element_ty), mask=mask)
            d_first = tl.where(kept, d_first, 0.0)
            tl.store(d_rows + where_first, d_first.to(d_rows.dtype.element_ty), mask=mask)
            total += tl.where(mask, u * value, 0.0)
            if SCALED:
                tl.store(scaled + own + column, (share * value).to(scaled.dtype.element_ty), mask=mask)
    tl.store(d_weights + pair, tl.sum(total))


@triton.jit
def _outer_kernel(
    left, right, order, offsets, weights, out, bias, M, N, left_row, right_row, o_e, o_m, o_n,
    LEFT_K: tl.constexpr, RIGHT_K: tl.constexpr, BIAS: tl.constexpr, WEIGHTED: tl.constexpr, EVEN: tl.constexpr,
    MATH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute out[e] [M, N], the sum over the rows of an expert of the outer products of left and right.

    Programs are (tile of the matrix, expert). An expert without rows gets zeros.

    Args:
        left, right: [rows, M] and [rows, N] in the order of the route; or of tokens, with LEFT_K (RIGHT_K) experts of
            a token.
        weights: [pairs].
        bias: [E, M], the sum of the rows of left (times their pairs' weights with WEIGHTED), with BIAS.
        EVEN: M and N are whole tiles.
    """
    tile, expert = tl.program_id(0), tl.program_id(1)
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = tile // (GROUP * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP, GROUP)
    pid_m = group * GROUP + tile % (GROUP * tiles_n) % height
    pid_n = tile % (GROUP * tiles_n) // height
    begin, end = tl.load(offsets + expert), tl.load(offsets + expert + 1)
    m, n = pid_m * BLOCK_M + tl.arange(0, BLOCK_M), pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    added = tl.zeros((BLOCK_M,), tl.float32)
    for start in range(begin, end, BLOCK_R):
        row = start + tl.arange(0, BLOCK_R)
        real = row < end
        from_left, from_right = row, row
        if LEFT_K > 0 or RIGHT_K > 0 or WEIGHTED:
            pair = tl.load(order + row, mask=real, other=0)
            if LEFT_K > 0:
                from_left = pair // LEFT_K
            if RIGHT_K > 0:
                from_right = pair // RIGHT_K
        at_left = left + from_left.to(tl.int64)[:, None] * left_row + m[None, :]
        at_right = right + from_right.to(tl.int64)[:, None] * right_row + n[None, :]
        if EVEN:
            a = tl.load(at_left, mask=real[:, None], other=0.0)
            b = tl.load(at_right, mask=real[:, None], other=0.0)
        else:
            a = tl.load(at_left, mask=real[:, None] & (m < M)[None, :], other=0.0)
            b = tl.load(at_right, mask=real[:, None] & (n < N)[None, :], other=0.0)
        if MATH == FP32:
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(tl.trans(a), b, acc, input_precision="ieee")
        if BIAS:
            each = a.to(tl.float32)
            if WEIGHTED:
                share = tl.load(weights + pair, mask=real, other=0.0).to(tl.float32)
                each = each * share[:, None]
            added += tl.sum(each, axis=0)
    at = out + expert.to(tl.int64) * o_e + (m.to(tl.int64)[:, None] * o_m + n.to(tl.int64)[None, :] * o_n)
    tl.store(at, acc.to(out.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])
    if BIAS and pid_n == 0:
        tl.store(bias + expert.to(tl.int64) * M + m, added.to(bias.dtype.element_ty), mask=m < M)
