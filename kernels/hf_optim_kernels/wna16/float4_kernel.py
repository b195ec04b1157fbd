"""The Triton kernels of ``hf_optim::wna16`` on 4-bit floats (``float4``), as those on integers in ``kernel``.

A number times its scale has six bits of mantissa at most: it is exact in bfloat16 and float16. So scales multiply the
left operand, in registers, and all columns of a tile have one sum. The scales of a k-tile are one block of words, of
which each slice of 64 columns takes a byte; they are fetched while the k-tile before is multiplied.

The power of two of an e8m0 scale may lie beyond the exponents of float16. There the sums of groups are scaled.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP16, FP32
from ..common.splitk import output_tile, store_split
from . import float4
from .decode import floats, scale_factor, scaled_floats
from .kernel import _x_tile

SLICE, FACTOR = tl.constexpr(float4.SLICE), tl.constexpr(float4.FACTOR)
TILE = tl.constexpr(4 * float4.SLICE)


@triton.jit
def tile_scales(scale, k_tile, cols, N, K, GROUP: tl.constexpr):
    """Return the words of the scales of a k-tile, the last one beyond the end: int32 [BLOCK_N, SLICE / GROUP]."""
    WORDS: tl.constexpr = SLICE // GROUP
    k_tile = tl.minimum(k_tile, tl.cdiv(K, TILE) - 1)
    return tl.load(scale + (k_tile * N + cols)[:, None] * WORDS + tl.arange(0, WORDS)[None, :])


@triton.jit
def _columns_of(groups, GROUP: tl.constexpr):
    """Return a column for each column of a slice: [BLOCK_N, SLICE] from [BLOCK_N, SLICE / GROUP]."""
    rows: tl.constexpr = groups.shape[0]
    words: tl.constexpr = groups.shape[1]
    return tl.reshape(tl.broadcast_to(groups[:, :, None], (rows, words, GROUP)), (rows, words * GROUP))


@triton.jit
def add_tile(
    acc, words, scales, x, rows, first, M, K, stride_x,
    GROUP: tl.constexpr, FORMAT: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` [BLOCK_N, BLOCK_M] plus the product of a k-tile: words [BLOCK_N, SLICE], and their scales.

    Of NVFP4 it is 128 times too small.
    """
    numbers = scaled_floats(words, _columns_of(scales, GROUP), FORMAT, MATH, ASM)
    for p in tl.static_range(4):
        tile = _x_tile(x, rows, first + p * SLICE, M, K, stride_x, SLICE, MATH)
        acc = tl.dot(numbers[p], tile, acc, input_precision="ieee")
    return acc


@triton.jit
def add_groups(
    acc, tile, scale, k_tile, x, rows, cols, M, N, K, stride_x, GROUP: tl.constexpr, MATH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Return ``add_tile`` of MXFP4 in float16, group by group; ``tile`` [BLOCK_N, 1] points to the words of rows."""
    WORDS: tl.constexpr = SLICE // GROUP
    for q in tl.static_range(WORDS):
        numbers = floats(tl.load(tile + q * GROUP + tl.arange(0, GROUP)[None, :]), MATH, ASM)
        scales = tl.load(scale + (k_tile * N + cols) * WORDS + q)
        for p in tl.static_range(4):
            inputs = _x_tile(x, rows, k_tile * TILE + p * SLICE + q * GROUP, M, K, stride_x, GROUP, MATH)
            part = tl.dot(numbers[p], inputs, input_precision="ieee")
            acc += part * scale_factor(scales, p, 2, FP32)[:, None]
    return acc


@triton.jit
def accumulate(
    acc, x, words, scale, divisor, rows, cols, start, stop, M, N, K, stride_x, stride_tile,
    GROUP: tl.constexpr, FORMAT: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` [BLOCK_N, BLOCK_M] plus the products of every ``STEP``-th k-tile from ``start`` to ``stop``."""
    tile = words + cols[:, None] * SLICE
    if MATH == FP16 and FORMAT == 2:
        for k_tile in range(start, stop, STEP):
            acc = add_groups(acc, tile + k_tile * stride_tile, scale, k_tile, x, rows, cols, M, N, K, stride_x, GROUP,
                             MATH, ASM)  # fmt: skip
    else:
        scales = tile_scales(scale, start, cols, N, K, GROUP)
        for k_tile in range(start, stop, STEP):
            found = tl.load(tile + k_tile * stride_tile + tl.arange(0, SLICE)[None, :])
            following = tile_scales(scale, k_tile + STEP, cols, N, K, GROUP)
            acc = add_tile(acc, found, scales, x, rows, k_tile * TILE, M, K, stride_x, GROUP, FORMAT, MATH, ASM)
            scales = following
    if FORMAT == 1:
        acc = acc * FACTOR / tl.load(divisor + cols)[:, None]
    return acc


@triton.jit(do_not_specialize=["M"])
def _float_linear_kernel(
    x, packed, scale, divisor, bias, out, partial, semaphores, M, N, K, stride_x, stride_tile,
    GROUP: tl.constexpr, HAS_BIAS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N] from every ``SPLIT``-th k-tile.

    x [M, K], packed int16 [k-tiles, N, SLICE], scale int32 [k-tiles, N, words], divisor float32 [N], of NVFP4
    (``FORMAT`` 1), partial [SPLIT, M, N].
    """
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, wanted, cols = output_tile(pid_m, pid_n, N, BLOCK_M, BLOCK_N)
    acc = accumulate(
        tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x, packed, scale, divisor, rows, cols, pid_s, tl.cdiv(K, TILE), M, N,
        K, stride_x, stride_tile, GROUP, FORMAT, MATH, ASM, SPLIT,
    )  # fmt: skip
    store_split(acc, partial, semaphores, bias, out, rows, wanted, cols, M, N, HAS_BIAS, SPLIT)


@triton.jit(do_not_specialize=["first_row", "rows"])
def _float_dense_kernel(
    packed, scale, divisor, out, N, K, stride_tile, first_row, rows,
    GROUP: tl.constexpr, FORMAT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decode rows ``first_row`` and on of the weight: out [rows, K]; a program decodes a k-tile of ``BLOCK_N`` rows."""
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_row + tl.minimum(wanted, rows - 1)
    k_tile = tl.program_id(0)
    words = tl.load(packed + k_tile * stride_tile + cols[:, None] * SLICE + tl.arange(0, SLICE)[None, :])
    scales = tile_scales(scale, k_tile, cols, N, K, GROUP)
    numbers = floats(words, FP32, False)
    for p in tl.static_range(4):
        factor = scale_factor(scales, p, FORMAT, FP32)
        if FORMAT == 1:
            factor = factor * FACTOR / tl.load(divisor + cols)[:, None]
        k = k_tile * TILE + p * SLICE + tl.arange(0, SLICE)
        at = out + wanted.to(tl.int64)[:, None] * K + k[None, :]
        value = numbers[p] * _columns_of(factor, GROUP)
        tl.store(at, value.to(out.dtype.element_ty), mask=(wanted < rows)[:, None] & (k < K)[None, :])
