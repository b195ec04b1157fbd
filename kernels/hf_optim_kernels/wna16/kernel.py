"""The Triton kernels of ``hf_optim::wna16``; ``naive`` says what they compute, ``decode`` how codes become numbers.

One program of ``_linear_kernel`` makes a tile [BLOCK_M, BLOCK_N] of the output from every ``SPLIT``-th chunk of the
columns. Codes minus the middle of their grid are whole numbers up to 128, exact in bfloat16 and float16: the tensor
cores multiply these, and the scale of a group multiplies the float32 sum of its columns. With ``SPLIT > 1`` the program
that finishes last adds the partial sums of its tile in a fixed order: one launch, and the same input gives the same
bits.

``_dense_kernel`` writes the weight in 16 bits, for products with so many rows that the library's is faster.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .decode import FP32, bytes_, nibbles


@triton.jit
def _x_tile(x, rows, first, M, K, stride_x, PLANE: tl.constexpr, MATH: tl.constexpr):
    """``x[rows, first : first + PLANE].T``."""
    k = first + tl.arange(0, PLANE)
    at = x + rows.to(tl.int64)[None, :] * stride_x + k[:, None]
    tile = tl.load(at, mask=(rows < M)[None, :] & (k < K)[:, None], other=0.0)
    return tile.to(tl.float32) if MATH == FP32 else tile


@triton.jit
def _column(values, first, cols, N, K, GROUP: tl.constexpr):
    """Scales (or zero points) of the group that column ``first`` belongs to: [BLOCK_N, 1]."""
    return tl.load(values + (tl.minimum(first, K - 1) // GROUP) * N + cols)[:, None]


@triton.jit
def _columns(values, first, cols, N, K, PLANE: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr,
             WIDTH: tl.constexpr):  # fmt: skip
    """Scales (or zero points) of four planes; planes that share one, or that a chunk does not have, repeat it."""
    v0 = _column(values, first, cols, N, K, GROUP)
    v1 = _column(values, first + PLANE, cols, N, K, GROUP) if SHARING == 1 else v0
    v2 = _column(values, first + 2 * PLANE, cols, N, K, GROUP) if WIDTH == 4 and SHARING < 4 else v0
    v3 = _column(values, first + 3 * PLANE, cols, N, K, GROUP) if WIDTH == 4 and SHARING == 1 else v2
    return v0, v1, v2, v3


@triton.jit
def _planes(words, WIDTH: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr):
    """The numbers ``code - middle`` of a chunk: [BLOCK_N, PLANE] for each plane."""
    if WIDTH == 8:
        return bytes_(words, MATH, ASM)
    else:
        return nibbles(words, MATH, ASM)


@triton.jit
def _chunk(
    acc, words, x, scales, zeros, rows, first, M, K, stride_x,
    PLANE: tl.constexpr, SHARING: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr, MATH: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """``acc`` [BLOCK_N, BLOCK_M] plus the product of a chunk. The weight stands on the left, in registers.

    ``SHARING`` consecutive planes have one scale and zero point. What a zero point adds is the same for all columns of
    its group: it multiplies the sum of the inputs, after the product.
    """
    MIDDLE: tl.constexpr = 1 << (WIDTH - 1)
    planes = _planes(words, WIDTH, MATH, ASM)
    part = tl.zeros(acc.shape, tl.float32)
    sums = tl.zeros(acc.shape, tl.float32)
    for p in tl.static_range(16 // WIDTH):
        tile = _x_tile(x, rows, first + p * PLANE, M, K, stride_x, PLANE, MATH)
        if p % SHARING == 0:
            part = tl.zeros(acc.shape, tl.float32)
            sums = tl.zeros(acc.shape, tl.float32)
        part = tl.dot(planes[p], tile, part, input_precision="ieee")
        if HAS_ZERO:
            # A product with ones has the sums where they are needed, on units that have time for it.
            ones = tl.full([acc.shape[0], PLANE], 1.0, tile.dtype)
            sums = tl.dot(ones, tile, sums, input_precision="ieee")
        if p % SHARING == SHARING - 1:
            if HAS_ZERO:
                part -= (zeros[p].to(tl.float32) - MIDDLE) * sums
            acc += part * scales[p].to(tl.float32)
    return acc


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    x, packed, scale, zero, bias, out, partial, counters, M, N, K, stride_x, stride_chunk,
    PLANE: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, HAS_ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
    WIDTH: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SPLIT: tl.constexpr,
):  # fmt: skip
    """x [M, K], packed int16 [chunks, N, PLANE], scale and zero [groups, N], out [M, N], partial [SPLIT, M, N]."""
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end repeat the last one and are not stored: loads of the weight then need no mask.
    cols = tl.minimum(wanted, N - 1)
    tile = packed + cols[:, None] * PLANE + tl.arange(0, PLANE)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    PER_CHUNK: tl.constexpr = PLANE * (16 // WIDTH)
    # The scales of a chunk are fetched while the one before it is multiplied: nothing else hides their latency.
    s0, s1, s2, s3 = _columns(scale, pid_s * PER_CHUNK, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
    if HAS_ZERO:
        z0, z1, z2, z3 = _columns(zero, pid_s * PER_CHUNK, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
    for chunk in range(pid_s, tl.cdiv(K, PER_CHUNK), SPLIT):
        words = tl.load(tile + chunk * stride_chunk)
        first = chunk * PER_CHUNK
        following = first + SPLIT * PER_CHUNK
        n0, n1, n2, n3 = _columns(scale, following, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
        if HAS_ZERO:
            m0, m1, m2, m3 = _columns(zero, following, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
            zeros = (z0, z1, z2, z3)
        else:
            zeros = (s0, s0, s0, s0)  # not looked at
        acc = _chunk(acc, words, x, (s0, s1, s2, s3), zeros, rows, first, M, K, stride_x,
                     PLANE, SHARING, HAS_ZERO, WIDTH, MATH, ASM)  # fmt: skip
        s0, s1, s2, s3 = n0, n1, n2, n3
        if HAS_ZERO:
            z0, z1, z2, z3 = m0, m1, m2, m3
    at = rows.to(tl.int64)[None, :] * N + wanted[:, None]
    mask = (rows < M)[None, :] & (wanted < N)[:, None]
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        tl.store(partial + pid_s * size + at, acc, mask=mask)
        tl.debug_barrier()  # every thread's part is written before one of them says so
        counter = counters + pid_m * tl.num_programs(0) + pid_n
        last = tl.atomic_add(counter, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for part in tl.static_range(SPLIT):
                acc += tl.load(partial + part * size + at, mask=mask, other=0.0)
            if HAS_BIAS:
                acc += tl.load(bias + cols).to(tl.float32)[:, None]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
            tl.store(counter, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + cols).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _dense_kernel(
    packed, scale, zero, out, N, K, stride_chunk,
    PLANE: tl.constexpr, GROUP: tl.constexpr, SHARING: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """out [N, K] = the weight; a program decodes one chunk of ``BLOCK_N`` rows."""
    wanted = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.minimum(wanted, N - 1)
    chunk = tl.program_id(0)
    words = tl.load(packed + chunk * stride_chunk + cols[:, None] * PLANE + tl.arange(0, PLANE)[None, :])
    COUNT: tl.constexpr = 16 // WIDTH
    first = chunk * PLANE * COUNT
    scales = _columns(scale, first, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
    zeros = _columns(zero, first, cols, N, K, PLANE, GROUP, SHARING, WIDTH)
    planes = _planes(words, WIDTH, MATH, ASM)
    for p in tl.static_range(COUNT):
        number = planes[p].to(tl.float32)
        if HAS_ZERO:
            number -= zeros[p].to(tl.float32) - (1 << (WIDTH - 1))
        w = number * scales[p].to(tl.float32)
        k = first + p * PLANE + tl.arange(0, PLANE)
        at = out + wanted.to(tl.int64)[:, None] * K + k[None, :]
        tl.store(at, w.to(out.dtype.element_ty), mask=(wanted < N)[:, None] & (k < K)[None, :])
