"""The Triton kernel for few rows: quantize, multiply, scale and add the bias in one launch.

The weight is the left operand of ``tl.dot``, so that its rows fill the machine however few those of the inputs are.
Every program reads its rows of ``x`` once to compute their grids (they are in the L2 cache) and quantizes tiles of them
on the way. ``SPLIT`` programs share the columns of a tile, see ``common.splitk``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.numerics import INFINITY_BITS, magnitude
from ..common.splitk import store_part, sum_parts, tile_parts
from .quantize import encode, token_grid


@triton.jit
def scaled(acc, w_scale, x_scale, w_sum, x_zero, bias, HAS_BIAS: tl.constexpr, ASYMMETRIC: tl.constexpr):
    """Return a tile of the result in float32, from sums of products of codes; the other operands are broadcast."""
    if ASYMMETRIC:
        acc = acc - w_sum * x_zero
    out = acc.to(tl.float32) * x_scale * w_scale
    if HAS_BIAS:
        out += bias
    return out


@triton.jit
def accumulate(a, b, acc, FLOAT8: tl.constexpr):
    """Return ``acc + a b``: exact in int32; products of float8 are summed in full float32 after every 32 of them."""
    if FLOAT8:
        return tl.dot(a, b, acc, max_num_imprecise_acc=32)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def row_grids(
    x, M, K, STATIC: tl.constexpr, FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr, EPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Return scales and zero points [1, ROWS] of the first rows of ``x`` [M, K], and their magnitudes in bits."""
    row = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    top = tl.zeros([1, ROWS], tl.int32)
    low = tl.zeros([1, ROWS], tl.float32)
    high = tl.zeros([1, ROWS], tl.float32)
    for k in range(0, K, BLOCK):
        inside = (row < M) & (k + column < K)
        value = tl.load(x + row.to(tl.int64) * K + k + column, inside, 0.0).to(tl.float32)
        top = tl.maximum(top, tl.max(magnitude(value), 0, keep_dims=True))
        if ASYMMETRIC and not STATIC:
            low = tl.minimum(low, tl.min(value, 0, keep_dims=True))
            high = tl.maximum(high, tl.max(value, 0, keep_dims=True))
    scale, zero = token_grid(top, low, high, x.dtype.element_ty, EPS, FLOAT8, ASYMMETRIC and not STATIC)
    return scale, zero, top


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x, weight, w_scale, w_sum, bias, x_scale, x_zero, y, partial, semaphores, M, N, K,
    QUANTIZED: tl.constexpr, STATIC: tl.constexpr, FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr,
    HAS_BIAS: tl.constexpr, EPS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, GRID_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Program (i, s) computes part s of rows i * BLOCK_N of the weight, for all rows of ``x``; M <= BLOCK_M.

    ``QUANTIZED``: ``x`` holds codes, and ``x_scale`` [M], ``x_zero`` [M] are theirs; else ``x`` is quantized here, on
    the static grid ``x_scale`` [1], ``x_zero`` [1] if ``STATIC``. ``ROWS`` is 1 for one row of input, whose tile is
    computed once and broadcast, else BLOCK_M.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)[None, :]
    row = tl.arange(0, ROWS)[None, :]
    k_offsets = tl.arange(0, BLOCK_K)
    if QUANTIZED:
        shown = tl.load(x_scale + m, m < M, 0.0)
        zero = tl.zeros([1, BLOCK_M], tl.int32)
        if ASYMMETRIC:
            zero = tl.load(x_zero + m, m < M, 0)
    else:
        scale, zero, top = row_grids(x, M, K, STATIC, FLOAT8, ASYMMETRIC, EPS, ROWS, GRID_BLOCK)
        shown = scale
        if STATIC:
            scale = tl.zeros([1, ROWS], tl.float32) + tl.load(x_scale).to(tl.float32)
            if ASYMMETRIC:
                zero = tl.zeros([1, ROWS], tl.int32) + tl.load(x_zero).to(tl.int32)
            shown = tl.where(top >= INFINITY_BITS, top.to(tl.float32, bitcast=True), scale)
    # Rows beyond the weight repeat its last one; they are not stored.
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    start = part * steps * BLOCK_K
    stop = tl.minimum(start + steps * BLOCK_K, K)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32 if FLOAT8 else tl.int32)
    for k in tl.range(start, stop, BLOCK_K):
        column = k + k_offsets
        if EVEN:
            w = tl.load(w_rows + column[None, :])
            inside = row < M
        else:
            w = tl.load(w_rows + column[None, :], column[None, :] < K, 0.0)
            inside = (row < M) & (column[:, None] < K)
        codes = tl.load(x + row.to(tl.int64) * K + column[:, None], inside, 0.0)
        if not QUANTIZED:
            codes = encode(codes.to(tl.float32), scale, zero, DTYPE, FLOAT8, ASYMMETRIC)
        acc = accumulate(w, tl.broadcast_to(codes, (BLOCK_K, BLOCK_M)), acc, FLOAT8)
    last = True
    if SPLIT > 1:
        parts = tile_parts(partial, tile, BLOCK_M, BLOCK_N, SPLIT)
        last = store_part(acc, parts, part, semaphores, tile, SPLIT)
    if last:
        if SPLIT > 1:
            acc = sum_parts(acc, parts, semaphores, tile, SPLIT)
        column = n[:, None]
        there = column < N
        sums = column
        if ASYMMETRIC:
            sums = tl.load(w_sum + column, there, 0)
        added = tl.zeros([BLOCK_N, 1], tl.float32)
        if HAS_BIAS:
            added = tl.load(bias + column, there, 0.0).to(tl.float32)
        scales = tl.load(w_scale + column, there, 0.0)
        out = scaled(acc, scales, shown, sums, zero, added, HAS_BIAS, ASYMMETRIC)
        tl.store(y + m.to(tl.int64) * N + column, out.to(y.dtype.element_ty), there & (m < M))
