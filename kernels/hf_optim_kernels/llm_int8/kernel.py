"""The Triton kernels of LLM.int8(): two launches, and the host never learns where the outliers are.

``rows_kernel`` quantizes each row with its outliers left out of the scale, and marks their columns; its last program to
arrive lists the marked columns. The products run over all columns of the codes, then take the listed columns out of
the integer sum (exactly, for they are the same integers) and add them in the type of the input. So the loop over all
columns is that of a plain int8 product, and the outliers cost what their columns weigh.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..w8a8.gemm import swizzled
from ..w8a8.quantize import ROUND, magnitude


@triton.jit(do_not_specialize=["threshold", "rows"])
def rows_kernel(x, codes, scales, columns, count, flags, counter, threshold, rows, K, stride, BLOCK: tl.constexpr):
    """Program m makes row m. ``flags`` [K] and ``counter`` [1] are zero before and after the launch."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    value = tl.load(x + row * stride + column, inside, 0.0).to(tl.float32)
    # Compared as integers: Inf and NaN are above every threshold.
    outlying = magnitude(value) > magnitude(tl.zeros([BLOCK], tl.float32) + threshold)
    inner = tl.where(outlying, 0.0, value)
    top = tl.max(tl.abs(inner), 0)
    inverse = tl.where(top > 0.0, 127.0 / tl.where(top > 0.0, top, 1.0), 0.0)
    steps = tl.minimum(tl.maximum(inner * inverse, -127.0), 127.0)
    tl.store(codes + row * K + column, ((steps + ROUND) - ROUND).to(tl.int8), inside)
    tl.store(scales + row, top / 127.0)
    tl.atomic_max(flags + column, 1, mask=outlying & inside, sem="relaxed")
    tl.debug_barrier()
    if tl.atomic_add(counter, 1, sem="acq_rel") == rows - 1:
        flag = tl.load(flags + column, inside, 0, cache_modifier=".cg")
        place = tl.cumsum(flag, 0) - 1
        tl.store(columns + place, column, flag > 0)
        tl.store(count, tl.sum(flag, 0))
        tl.store(flags + column, 0, inside)
        tl.store(counter, 0)


@triton.jit
def outliers(
    acc, left, left_real, right, right_real, right_scale, left_scale, columns, count,
    REAL: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """``acc`` [L, R] of all columns (int32) -> float32, without the listed columns and scaled, plus their product.

    ``left`` [L, 1], ``right`` [1, R] point to rows of codes; ``left_real``, ``right_real`` to the rows that take part
    in the real product (the weight's codes, and the unquantized input); scales are those of the input alone, 1 on the
    other side. ``REAL`` is the type in which that product is made.
    """
    chunk = tl.arange(0, CHUNK)
    total = tl.load(count)
    for start in range(0, total, CHUNK):
        there = start + chunk < total
        column = tl.load(columns + start + chunk, there, 0)
        a = tl.load(left + column[None, :], there[None, :], 0)
        b = tl.load(right + column[:, None], there[:, None], 0)
        # Codes are at least -127, so that the negative of each is a code.
        acc = tl.dot(a, -b, acc, out_dtype=tl.int32)
    out = acc.to(tl.float32) * left_scale * right_scale
    for start in range(0, total, CHUNK):
        there = start + chunk < total
        column = tl.load(columns + start + chunk, there, 0)
        a = tl.load(left_real + column[None, :], there[None, :], 0.0).to(REAL)
        b = tl.load(right_real + column[:, None], there[:, None], 0.0).to(REAL)
        out = tl.dot(a, b, out, input_precision="ieee")
    return out


@triton.jit(do_not_specialize=["M"])
def decode_kernel(
    x, codes, x_scale, columns, count, weight, w_scale, bias, y, partial, counters, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Few rows (M <= BLOCK_M): as ``w8a8.kernel.decode_kernel``, the outliers by the last program of a tile."""
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)[None, :]
    k_offsets = tl.arange(0, BLOCK_K)
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    # Rows beyond the end repeat the last one; they are not stored.
    held = tl.minimum(m, M - 1).to(tl.int64) * K
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    start = part * steps * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k in tl.range(start, tl.minimum(start + steps * BLOCK_K, K), BLOCK_K):
        column = k + k_offsets
        if EVEN:
            w = tl.load(w_rows + column[None, :])
            c = tl.load(codes + held + column[:, None])
        else:
            w = tl.load(w_rows + column[None, :], column[None, :] < K, 0)
            c = tl.load(codes + held + column[:, None], column[:, None] < K, 0)
        acc = tl.dot(w, c, acc, out_dtype=tl.int32)
    last = True
    if SPLIT > 1:
        parts = partial + tile.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M)
        parts += tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + m
        tl.store(parts + part * (BLOCK_N * BLOCK_M), acc)
        tl.debug_barrier()
        last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        if SPLIT > 1:
            acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            for s in range(SPLIT):
                acc += tl.load(parts + s * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(counters + tile, 0)
        scales = tl.load(x_scale + m, m < M, 0.0)
        out = outliers(acc, w_rows, w_rows, codes + held, x + held, scales, 1.0, columns, count, REAL, 32)
        column = n[:, None]
        there = column < N
        out *= tl.load(w_scale + column, there, 0.0)
        if HAS_BIAS:
            out += tl.load(bias + column, there, 0.0).to(tl.float32)
        tl.store(y + m.to(tl.int64) * N + column, out.to(y.dtype.element_ty), there & (m < M))


@triton.jit(do_not_specialize=["M"])
def grouped_kernel(
    x, codes, x_scale, columns, count, weight, w_scale, bias, y, M, N, K,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Many rows: one program, one tile of the result."""
    i, j = swizzled(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offsets = tl.arange(0, BLOCK_K)
    held = tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in tl.range(0, K, BLOCK_K):
        column = k + k_offsets
        if EVEN:
            a = tl.load(codes + held + column[None, :])
            b = tl.load(w_rows + column[:, None])
        else:
            a = tl.load(codes + held + column[None, :], column[None, :] < K, 0)
            b = tl.load(w_rows + column[:, None], column[:, None] < K, 0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    row, column = m[:, None], n[None, :]
    scales = tl.load(x_scale + row, row < M, 0.0)
    # A code of the weight is at least -127 as well.
    out = outliers(acc, codes + held, x + held, w_rows, w_rows, 1.0, scales, columns, count, REAL, 32)
    out *= tl.load(w_scale + column, column < N, 0.0)
    if HAS_BIAS:
        out += tl.load(bias + column, column < N, 0.0).to(tl.float32)
    tl.store(y + row.to(tl.int64) * N + column, out.to(y.dtype.element_ty), (row < M) & (column < N))
