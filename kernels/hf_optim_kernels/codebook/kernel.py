"""The Triton kernels of ``hf_optim::codebook_linear``; ``naive`` says what they compute, ``lookup`` how codes are read.

One program of ``_linear_kernel`` makes a tile [BLOCK_M, BLOCK_N] of the output from every ``SPLIT``-th chunk of the
columns, as if there were no outliers (their codes are 0), and from every ``SPLIT``-th EDGE of the outliers of its
rows, for which ``value x - centroids[0] x`` is added: a matrix of the values at their rows, and one of ones, times the
inputs of their columns. With ``SPLIT > 1`` the program that finishes last adds the partial sums of its tile in a fixed
order.

``_dense_kernel`` writes the weight without its outliers, for products with so many rows that the library's is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .lookup import FP32, four_planes


@triton.jit
def _words(words, at, stride_bit, BITS: tl.constexpr):
    """The words of each bit; what a code does not have repeats the first."""
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
    """``x[rows, k].T``."""
    at = x + rows.to(tl.int64)[None, :] * stride_x + k[:, None]
    tile = tl.load(at, mask=(rows < M)[None, :] & (k < K)[:, None], other=0.0)
    return tile.to(tl.float32) if MATH == FP32 else tile


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, words, table, registers, values, columns, owners, starts, bias, out, partial, counters, M, N, K, stride_x,
    stride_bit, stride_chunk,
    PLANE: tl.constexpr, BITS: tl.constexpr, HAS_BIAS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """x [M, K], words int16 [BITS, chunks, N, PLANE], out [M, N], partial [SPLIT, M, N]; owners: rows of outliers."""
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end repeat the last one and are not stored: loads of the weight then need no mask.
    cols = tl.minimum(wanted, N - 1)
    at = cols[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    r0, r1, r2, r3 = tl.load(registers), tl.load(registers + 1), tl.load(registers + 2), tl.load(registers + 3)
    r4, r5, r6, r7 = tl.load(registers + 4), tl.load(registers + 5), tl.load(registers + 6), tl.load(registers + 7)
    k_offsets = tl.arange(0, PLANE)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for chunk in range(pid_s, tl.cdiv(K, PLANE * 16), SPLIT):
        held = _words(words + chunk * stride_chunk, at, stride_bit, BITS)
        first = chunk * PLANE * 16
        for p in tl.static_range(4):
            planes = four_planes(held, table, r0, r1, r2, r3, r4, r5, r6, r7, p, BITS, MATH, ASM)
            for q in tl.static_range(4):
                tile = _x_tile(x, rows, first + (p + 4 * q) * PLANE + k_offsets, M, K, stride_x, MATH)
                acc = tl.dot(planes[q], tile, acc, input_precision="ieee")
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
    at_out = rows.to(tl.int64)[None, :] * N + wanted[:, None]
    mask = (rows < M)[None, :] & (wanted < N)[:, None]
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        tl.store(partial + pid_s * size + at_out, acc, mask=mask)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        counter = counters + pid_m * tl.num_programs(0) + pid_n
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(SPLIT):
                acc += tl.load(partial + part * size + at_out, mask=mask, other=0.0)
            if HAS_BIAS:
                acc += tl.load(bias + cols).to(tl.float32)[:, None]
            tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=mask)
            tl.store(counter, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + cols).to(tl.float32)[:, None]
        tl.store(out + at_out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dense_kernel(
    words, table, registers, out, first_row, N, K, stride_bit, stride_chunk,
    PLANE: tl.constexpr, BITS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the weight from ``first_row`` on, without outliers; a program decodes a chunk of BLOCK_N rows."""
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = first_row + tl.minimum(wanted, N - 1)
    chunk = tl.program_id(0)
    k_offsets = tl.arange(0, PLANE)
    at = cols[:, None] * PLANE + k_offsets[None, :]
    r0, r1, r2, r3 = tl.load(registers), tl.load(registers + 1), tl.load(registers + 2), tl.load(registers + 3)
    r4, r5, r6, r7 = tl.load(registers + 4), tl.load(registers + 5), tl.load(registers + 6), tl.load(registers + 7)
    held = _words(words + chunk * stride_chunk, at, stride_bit, BITS)
    for p in tl.static_range(4):
        planes = four_planes(held, table, r0, r1, r2, r3, r4, r5, r6, r7, p, BITS, MATH, ASM)
        for q in tl.static_range(4):
            k = chunk * PLANE * 16 + (p + 4 * q) * PLANE + k_offsets
            at_out = out + wanted.to(tl.int64)[:, None] * K + k[None, :]
            tl.store(at_out, planes[q].to(out.dtype.element_ty), mask=(wanted < N)[:, None] & (k < K)[None, :])
