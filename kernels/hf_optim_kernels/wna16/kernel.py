"""The Triton kernels of ``hf_optim::wna16`` (specified by ``naive``; ``decode`` converts codes to numbers).

One program of ``_linear_kernel`` computes a tile [BLOCK_M, BLOCK_N] of the output from every ``SPLIT``-th k-tile. Codes
minus their zero offset are whole numbers up to 128, exact in bfloat16 and float16: the tensor cores multiply these, and
the scale of a group multiplies the float32 sum of its columns. ``SPLIT > 1`` is split-k, see ``common.splitk``.

``_dense_kernel`` writes the weight in 16 bits, for products with so many rows that the library's is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from ..common.splitk import output_tile, store_split
from .decode import bytes_, nibbles


@triton.jit
def _x_tile(x, rows, first, M, K, stride_x, SLICE: tl.constexpr, MATH: tl.constexpr):
    """Return ``x[rows, first : first + SLICE].T``."""
    k = first + tl.arange(0, SLICE)
    at = x + rows.to(tl.int64)[None, :] * stride_x + k[:, None]
    tile = tl.load(at, mask=(rows < M)[None, :] & (k < K)[:, None], other=0.0)
    return tile.to(tl.float32) if MATH == FP32 else tile


@triton.jit
def _column(values, first, cols, N, K, GROUP: tl.constexpr):
    """Return scales (or zero points) of the group that column ``first`` belongs to: [BLOCK_N, 1]."""
    return tl.load(values + (tl.minimum(first, K - 1) // GROUP) * N + cols)[:, None]


@triton.jit
def _columns(values, first, cols, N, K, SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Return scales (or zero points) of four slices, repeated where slices share one or a k-tile has fewer."""
    v0 = _column(values, first, cols, N, K, GROUP)
    v1 = _column(values, first + SLICE, cols, N, K, GROUP) if PER_SCALE == 1 else v0
    v2 = _column(values, first + 2 * SLICE, cols, N, K, GROUP) if WIDTH == 4 and PER_SCALE < 4 else v0
    v3 = _column(values, first + 3 * SLICE, cols, N, K, GROUP) if WIDTH == 4 and PER_SCALE == 1 else v2
    return v0, v1, v2, v3


@triton.jit
def _slices(words, WIDTH: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the numbers ``code - zero offset`` of a k-tile: [BLOCK_N, SLICE] for each slice."""
    if WIDTH == 8:
        return bytes_(words, MATH, ASM)
    else:
        return nibbles(words, MATH, ASM)


@triton.jit
def _add_tile(
    acc, words, x, scales, zeros, rows, first, M, K, stride_x,
    SLICE: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr, MATH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` [BLOCK_N, BLOCK_M] plus the product of a k-tile. The weight is the left operand, in registers.

    ``PER_SCALE`` consecutive slices have one scale and zero point. The zero point is the same for all columns of its
    group, so it multiplies the sum of the inputs, after the product.
    """
    ZERO_OFFSET: tl.constexpr = 1 << (WIDTH - 1)
    slices = _slices(words, WIDTH, MATH, ASM)
    part = tl.zeros(acc.shape, tl.float32)
    sums = tl.zeros(acc.shape, tl.float32)
    for p in tl.static_range(16 // WIDTH):
        tile = _x_tile(x, rows, first + p * SLICE, M, K, stride_x, SLICE, MATH)
        if p % PER_SCALE == 0:
            part = tl.zeros(acc.shape, tl.float32)
            sums = tl.zeros(acc.shape, tl.float32)
        part = tl.dot(slices[p], tile, part, input_precision="ieee")
        if HAS_ZERO:
            # A product with ones leaves the sums where they are needed, and the tensor cores have time for it.
            ones = tl.full([acc.shape[0], SLICE], 1.0, tile.dtype)
            sums = tl.dot(ones, tile, sums, input_precision="ieee")
        if p % PER_SCALE == PER_SCALE - 1:
            if HAS_ZERO:
                part -= (zeros[p].to(tl.float32) - ZERO_OFFSET) * sums
            acc += part * scales[p].to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, packed, scale, zero, bias, out, partial, semaphores, M, N, K, stride_x, stride_tile,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N].

    x [M, K], packed int16 [k-tiles, N, SLICE], scale and zero [groups, N], partial [SPLIT, M, N].
    """
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, wanted, cols = output_tile(pid_m, pid_n, N, BLOCK_M, BLOCK_N)
    tile = packed + cols[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    TILE_COLUMNS: tl.constexpr = SLICE * (16 // WIDTH)
    # The scales of a k-tile are fetched while the one before it is multiplied: nothing else hides their latency.
    s0, s1, s2, s3 = _columns(scale, pid_s * TILE_COLUMNS, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    if HAS_ZERO:
        z0, z1, z2, z3 = _columns(zero, pid_s * TILE_COLUMNS, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    for k_tile in range(pid_s, tl.cdiv(K, TILE_COLUMNS), SPLIT):
        words = tl.load(tile + k_tile * stride_tile)
        first = k_tile * TILE_COLUMNS
        following = first + SPLIT * TILE_COLUMNS
        n0, n1, n2, n3 = _columns(scale, following, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
        if HAS_ZERO:
            m0, m1, m2, m3 = _columns(zero, following, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
            zeros = (z0, z1, z2, z3)
        else:
            zeros = (s0, s0, s0, s0)  # not read
        acc = _add_tile(acc, words, x, (s0, s1, s2, s3), zeros, rows, first, M, K, stride_x,
                        SLICE, PER_SCALE, HAS_ZERO, WIDTH, MATH, ASM)  # fmt: skip
        s0, s1, s2, s3 = n0, n1, n2, n3
        if HAS_ZERO:
            z0, z1, z2, z3 = m0, m1, m2, m3
    store_split(acc, partial, semaphores, bias, out, rows, wanted, cols, M, N, HAS_BIAS, SPLIT)


@triton.jit
def _dense_kernel(
    packed, scale, zero, out, N, K, stride_tile,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decode out [N, K], the weight; a program decodes one k-tile of ``BLOCK_N`` rows."""
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.minimum(wanted, N - 1)
    k_tile = tl.program_id(0)
    words = tl.load(packed + k_tile * stride_tile + cols[:, None] * SLICE + tl.arange(0, SLICE)[None, :])
    COUNT: tl.constexpr = 16 // WIDTH
    first = k_tile * SLICE * COUNT
    scales = _columns(scale, first, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    zeros = _columns(zero, first, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    slices = _slices(words, WIDTH, MATH, ASM)
    for p in tl.static_range(COUNT):
        number = slices[p].to(tl.float32)
        if HAS_ZERO:
            number -= zeros[p].to(tl.float32) - (1 << (WIDTH - 1))
        w = number * scales[p].to(tl.float32)
        k = first + p * SLICE + tl.arange(0, SLICE)
        at = out + wanted.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(at, w.to(out.dtype.element_ty), mask=(wanted < N)[:, None] & (k < K)[None, :])
