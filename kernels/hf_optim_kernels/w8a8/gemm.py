"""Triton kernels for many rows of codes: int8 x int8 or float8 x float8, scaled as it is stored.

``grouped_kernel`` has one program per tile of the result, ``persistent_kernel`` as many as the device runs at a time,
each with one tile after the other, which reads through tensor descriptors (TMA; compute capability 9.0).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.gemm import swizzled
from ..common.splitk import store_part, sum_parts, tile_parts
from .kernel import scaled


@triton.jit
def multiply(a, b, acc, FLOAT8: tl.constexpr, PRECISE: tl.constexpr):
    """Return ``acc + a b``; sums of float8 leave the tensor core's shorter accumulator after PRECISE products."""
    if FLOAT8:
        return tl.dot(a, b, acc, max_num_imprecise_acc=PRECISE)
    else:
        return tl.dot(a, b, acc, out_dtype=tl.int32)


@triton.jit
def store_tile(
    acc, m, n, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Scale a tile of sums at rows ``m`` and columns ``n``, and store it."""
    row, column = m[:, None], n[None, :]
    sums, zero = column, row
    if ASYMMETRIC:
        sums = tl.load(w_sum + column, column < N, 0)
        zero = tl.load(x_zero + row, row < M, 0)
    added = tl.zeros(column.shape, tl.float32)
    if HAS_BIAS:
        added = tl.load(bias + column, column < N, 0.0).to(tl.float32)
    scales = tl.load(w_scale + column, column < N, 0.0)
    rows = tl.load(x_scale + row, row < M, 0.0)
    out = scaled(acc, scales, rows, sums, zero, added, HAS_BIAS, ASYMMETRIC)
    tl.store(y + row.to(tl.int64) * N + column, out.to(y.dtype.element_ty), (row < M) & (column < N))


@triton.jit(do_not_specialize=["M"])
def grouped_kernel(
    x, weight, w_scale, w_sum, bias, x_scale, x_zero, y, partial, semaphores, M, N, K,
    FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile per program: ``x`` [M, K] codes, ``weight`` [N, K] codes, ``y`` [M, N].

    ``PARTS`` programs (the second dimension) share the columns of a tile, see ``common.splitk``.
    """
    i, j = swizzled(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offsets = tl.arange(0, BLOCK_K)
    # Rows beyond the end repeat the last one; they are not stored.
    x_rows = x + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K
    part = tl.program_id(1)
    each = tl.cdiv(tl.cdiv(K, BLOCK_K), PARTS) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if FLOAT8 else tl.int32)
    for k in tl.range(part * each, tl.minimum(part * each + each, K), BLOCK_K):
        column = k + k_offsets
        if EVEN:
            a = tl.load(x_rows + column[None, :])
            b = tl.load(w_rows + column[:, None])
        else:
            a = tl.load(x_rows + column[None, :], column[None, :] < K, 0.0)
            b = tl.load(w_rows + column[:, None], column[:, None] < K, 0.0)
        acc = multiply(a, b, acc, FLOAT8, BLOCK_K)
    last = True
    if PARTS > 1:
        # ``tile_parts`` names the dimensions of a tile of the transposed result.
        parts = tile_parts(partial, tl.program_id(0), BLOCK_N, BLOCK_M, PARTS)
        last = store_part(acc, parts, part, semaphores, tl.program_id(0), PARTS)
    if last:
        if PARTS > 1:
            acc = sum_parts(acc, parts, semaphores, tl.program_id(0), PARTS)
        store_tile(acc, m, n, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, ASYMMETRIC, HAS_BIAS)


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
    x, weight, w_scale, w_sum, bias, x_scale, x_zero, y, partial, semaphores, M, N, K,
    FLOAT8: tl.constexpr, ASYMMETRIC: tl.constexpr, HAS_BIAS: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr, HALVES: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute tiles PROGRAMS apart, as ``grouped_kernel``. K is a multiple of 16: rows begin at multiples of 16 bytes.

    ``FLATTEN`` merges both loops, so that the next tile is read while this one is stored; ``HALVES`` stores a tile in
    two halves of its columns, which takes half the shared memory.
    """
    a_tiles = tl.make_tensor_descriptor(x, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        i, j = swizzled(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32 if FLOAT8 else tl.int32)
        for step in range(steps):
            a = a_tiles.load([i * BLOCK_M, step * BLOCK_K])
            b = b_tiles.load([j * BLOCK_N, step * BLOCK_K])
            acc = multiply(a, b.T, acc, FLOAT8, BLOCK_K)
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N
        if HALVES:
            pair = tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            first, second = tl.split(pair)
            left = n + tl.arange(0, BLOCK_N // 2)
            store_tile(first, m, left, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, ASYMMETRIC, HAS_BIAS)
            right = left + BLOCK_N // 2
            store_tile(second, m, right, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, ASYMMETRIC, HAS_BIAS)
        else:
            n = n + tl.arange(0, BLOCK_N)
            store_tile(acc, m, n, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, ASYMMETRIC, HAS_BIAS)
