"""The Triton kernels of LLM.int8() for many rows: the int8 products of ``w8a8.gemm``, corrected before they are stored.

With c the codes of all columns, s the scale of a row and O the outlying columns, what is stored is::

    (sum_k c[m, k] w[n, k]) s[m] + sum_{k in O} (x[m, k] - c[m, k] s[m]) w[n, k]

(times the weight's scale): the second sum replaces the codes of O by the input. It has CHUNK columns per step, and no
step where the list is empty, so that the loop over all columns is that of a plain int8 product. ``prepare_kernel``
gathers the operands of its first step contiguously; otherwise, and for later steps, tiles gather their own.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.gemm import swizzled
from ..common.splitk import store_part, sum_parts, tile_parts

CHUNK = tl.constexpr(16)


@triton.jit
def remainder(x, codes, scale, row, column, there, REAL: tl.constexpr):
    """Return ``x - codes * scale`` [rows, columns], 0 where not ``there``; ``row`` are offsets of rows."""
    value = tl.load(x + row + column, there, 0.0).to(tl.float32)
    return (value - tl.load(codes + row + column, there, 0).to(tl.float32) * scale).to(REAL)


@triton.jit
def store_corrected(
    acc, m, n, x, codes, x_scale, weight, w_scale, bias, columns, count, rests, chosen, y, M, N, K,
    HAS_BIAS: tl.constexpr, PREPARED: tl.constexpr, REAL: tl.constexpr,
):  # fmt: skip
    """Correct, scale and store a tile of sums at rows ``m`` and columns ``n``."""
    # Rows and columns beyond the end repeat the last ones; they are not stored.
    row, column = tl.minimum(m, M - 1).to(tl.int64)[:, None], tl.minimum(n, N - 1).to(tl.int64)[None, :]
    scale = tl.load(x_scale + row)
    out = acc.to(tl.float32) * scale
    total = tl.load(count)
    chunk = tl.arange(0, CHUNK)
    first = 0
    if PREPARED:
        first = CHUNK
        if total > 0:
            a = tl.load(rests + row * CHUNK + chunk[None, :])
            b = tl.load(chosen + column * CHUNK + chunk[:, None])
            out = tl.dot(a.to(REAL), b.to(REAL), out, input_precision="ieee")
    for start in range(first, total, CHUNK):
        there = start + chunk < total
        k = tl.load(columns + start + chunk, there, 0)
        a = remainder(x, codes, scale, row * K, k[None, :], there[None, :], REAL)
        b = tl.load(weight + column * K + k[:, None], there[:, None], 0).to(REAL)
        out = tl.dot(a, b, out, input_precision="ieee")
    out *= tl.load(w_scale + column)
    if HAS_BIAS:
        out += tl.load(bias + column).to(tl.float32)
    at = m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(y + at, out.to(y.dtype.element_ty), (m < M)[:, None] & (n < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def prepare_kernel(
    x, codes, x_scale, weight, columns, count, rests, chosen, M, N, K, REAL: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Gather ``rests`` [M, CHUNK] and ``chosen`` [N, CHUNK] of the first CHUNK listed columns, 0 beyond the list."""
    total = tl.load(count)
    if total > 0:
        chunk = tl.arange(0, CHUNK)[None, :]
        there = chunk < total
        k = tl.load(columns + chunk, there, 0)
        block, over = tl.program_id(0), tl.cdiv(M, ROWS)
        if block < over:
            m = (block * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            scale = tl.load(x_scale + m, m < M, 0.0)
            tl.store(rests + m * CHUNK + chunk, remainder(x, codes, scale, m * K, k, there & (m < M), REAL), m < M)
        else:
            n = ((block - over) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
            tl.store(chosen + n * CHUNK + chunk, tl.load(weight + n * K + k, there & (n < N), 0).to(REAL), n < N)


@triton.jit(do_not_specialize=["M"])
def grouped_kernel(
    x, codes, x_scale, weight, w_scale, bias, columns, count, rests, chosen, y, partial, semaphores, M, N, K,
    HAS_BIAS: tl.constexpr, PREPARED: tl.constexpr, REAL: tl.constexpr, EVEN: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute one tile of the result per program, as ``w8a8.gemm.grouped_kernel``."""
    i, j = swizzled(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP)
    m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    k_offsets = tl.arange(0, BLOCK_K)
    c_rows = codes + tl.minimum(m, M - 1).to(tl.int64)[:, None] * K
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[None, :] * K
    part = tl.program_id(1)
    each = tl.cdiv(tl.cdiv(K, BLOCK_K), PARTS) * BLOCK_K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for k in tl.range(part * each, tl.minimum(part * each + each, K), BLOCK_K):
        column = k + k_offsets
        if EVEN:
            a = tl.load(c_rows + column[None, :])
            b = tl.load(w_rows + column[:, None])
        else:
            a = tl.load(c_rows + column[None, :], column[None, :] < K, 0)
            b = tl.load(w_rows + column[:, None], column[:, None] < K, 0)
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    last = True
    if PARTS > 1:
        # ``tile_parts`` names the dimensions of a tile of the transposed result.
        parts = tile_parts(partial, tl.program_id(0), BLOCK_N, BLOCK_M, PARTS)
        last = store_part(acc, parts, part, semaphores, tl.program_id(0), PARTS)
    if last:
        if PARTS > 1:
            acc = sum_parts(acc, parts, semaphores, tl.program_id(0), PARTS)
        store_corrected(
            acc, m, n, x, codes, x_scale, weight, w_scale, bias, columns, count, rests, chosen, y, M, N, K,
            HAS_BIAS, PREPARED, REAL,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M"])
def persistent_kernel(
    x, codes, x_scale, weight, w_scale, bias, columns, count, rests, chosen, y, partial, semaphores, M, N, K,
    HAS_BIAS: tl.constexpr, PREPARED: tl.constexpr, REAL: tl.constexpr, PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Compute tiles PROGRAMS apart, as ``w8a8.gemm.persistent_kernel``. K is a multiple of 16."""
    a_tiles = tl.make_tensor_descriptor(codes, [M, K], [K, 1], [BLOCK_M, BLOCK_K])
    b_tiles = tl.make_tensor_descriptor(weight, [N, K], [K, 1], [BLOCK_N, BLOCK_K])
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    steps = tl.cdiv(K, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        i, j = swizzled(tile, M, N, BLOCK_M, BLOCK_N, GROUP)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
        for step in range(steps):
            a = a_tiles.load([i * BLOCK_M, step * BLOCK_K])
            b = b_tiles.load([j * BLOCK_N, step * BLOCK_K])
            acc = tl.dot(a, b.T, acc, out_dtype=tl.int32)
        m, n = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
        store_corrected(
            acc, m, n, x, codes, x_scale, weight, w_scale, bias, columns, count, rests, chosen, y, M, N, K,
            HAS_BIAS, PREPARED, REAL,
        )  # fmt: skip
