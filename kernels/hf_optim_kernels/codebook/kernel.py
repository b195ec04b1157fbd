"""The Triton kernels of ``hf_optim::codebook_linear`` (specified by ``naive``; ``lookup`` converts codes to numbers).

One program of ``_linear_kernel`` computes a tile [BLOCK_M, BLOCK_N] of the output from every ``SPLIT``-th k-tile, as if
there were no outliers (their codes are 0), and from every ``SPLIT``-th EDGE of the outliers of its rows, for which
``value x - centroids[0] x`` is added: a matrix of the values at their rows, and one of ones, times the inputs of their
columns. ``SPLIT > 1`` is split-k, see ``common.splitk``.

``_dense_kernel`` writes the weight without its outliers, for products with so many rows that the library's is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from ..common.splitk import output_tile, store_split
from .lookup import four_slices


@triton.jit
def _words(words, at, stride_bit, BITS: tl.constexpr):
    """Return the words of each bit; bits that a code does not have repeat the first word."""
    w0 = tl.load(words + at)
    w1 = tl.load(words + stride_bit + at)
    w2 = tl.load(words + 2 * stride_bit + at) if BITS > 2 else w0
    w3 = tl.load(words + 3 * stride_bit + at) if BITS > 3 else w0
    w4 = tl.load(words + 4 * stride_bit + at) if BITS > 4 else w0
    w5 = tl.load(words + 5 * stride_bit + at) if BITS > 5 else w0
    w6 = tl.load(words + 6 * stride_bit + at) if BITS > 6 else w0
    w7 = tl.load(words + 7 * stride_bit + at) if BITS > 7 else w0
    return w0, w1, w2, w3, w4, w5, w6, w7


@triton.jit
def _x_tile(x, rows, k, M, K, stride_x, MATH: tl.constexpr):
    """Return ``x[rows, k].T``."""
    at = x + rows.to(tl.int64)[None, :] * stride_x + k[:, None]
    tile = tl.load(at, mask=(rows < M)[None, :] & (k < K)[:, None], other=0.0)
    return tile.to(tl.float32) if MATH == FP32 else tile


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, words, table, registers, values, columns, owners, starts, bias, out, partial, semaphores, M, N, K, stride_x,
    stride_bit, stride_tile,
    SLICE: tl.constexpr, BITS: tl.constexpr, HAS_BIAS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N].

    x [M, K], words int16 [BITS, k-tiles, N, SLICE], partial [SPLIT, M, N]; owners: rows of outliers.
    """
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows, wanted, cols = output_tile(pid_m, pid_n, N, BLOCK_M, BLOCK_N)
    at = cols[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    r0, r1, r2, r3 = tl.load(registers), tl.load(registers + 1), tl.load(registers + 2), tl.load(registers + 3)
    r4, r5, r6, r7 = tl.load(registers + 4), tl.load(registers + 5), tl.load(registers + 6), tl.load(registers + 7)
    k_offsets = tl.arange(0, SLICE)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for k_tile in range(pid_s, tl.cdiv(K, SLICE * 16), SPLIT):
        held = _words(words + k_tile * stride_tile, at, stride_bit, BITS)
        first = k_tile * SLICE * 16
        for p in tl.static_range(4):
            slices = four_slices(held, table, r0, r1, r2, r3, r4, r5, r6, r7, p, BITS, MATH, ASM)
            for q in tl.static_range(4):
                tile = _x_tile(x, rows, first + (p + 4 * q) * SLICE + k_offsets, M, K, stride_x, MATH)
                acc = tl.dot(slices[q], tile, acc, input_precision="ieee")
    begin = tl.load(starts + pid_n * BLOCK_N)
    end = tl.load(starts + tl.minimum(pid_n * BLOCK_N + BLOCK_N, N))
    plain = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for each in range(begin + pid_s * EDGE, end, SPLIT * EDGE):
        entry = each + tl.arange(0, EDGE)
        there = entry < end
        tile = _x_tile(x, rows, tl.load(columns + entry, there, 0).to(tl.int32), M, K, stride_x, MATH)
        here = wanted[:, None] == tl.load(owners + entry, there, -1)[None, :]
        value = tl.load(values + entry, there, 0.0).to(tile.dtype)
        acc = tl.dot(tl.where(here, value[None, :], 0.0).to(tile.dtype), tile, acc, input_precision="ieee")
        plain = tl.dot(here.to(tile.dtype), tile, plain, input_precision="ieee")
    acc -= plain * tl.load(table).to(tl.float32)
    store_split(acc, partial, semaphores, bias, out, rows, wanted, cols, M, N, HAS_BIAS, SPLIT)


@triton.jit
def _dense_kernel(
    words, table, registers, out, first_row, N, K, stride_bit, stride_tile,
    SLICE: tl.constexpr, BITS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Decode out [N, K], the weight from ``first_row`` on without outliers; programs are (k-tiles, BLOCK_N rows)."""
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_row + tl.minimum(wanted, N - 1)
    k_tile = tl.program_id(0)
    k_offsets = tl.arange(0, SLICE)
    at = cols[:, None] * SLICE + k_offsets[None, :]
    r0, r1, r2, r3 = tl.load(registers), tl.load(registers + 1), tl.load(registers + 2), tl.load(registers + 3)
    r4, r5, r6, r7 = tl.load(registers + 4), tl.load(registers + 5), tl.load(registers + 6), tl.load(registers + 7)
    held = _words(words + k_tile * stride_tile, at, stride_bit, BITS)
    for p in tl.static_range(4):
        slices = four_slices(held, table, r0, r1, r2, r3, r4, r5, r6, r7, p, BITS, MATH, ASM)
        for q in tl.static_range(4):
            k = k_tile * SLICE * 16 + (p + 4 * q) * SLICE + k_offsets
            at_out = out + wanted.to(tl.int64)[:, None] * K + k[None, :]
            tl.store(at_out, slices[q].to(out.dtype.element_ty), mask=(wanted < N)[:, None] & (k < K)[None, :])
