"""The Triton kernels of LLM.int8() for few rows, and the one that quantizes rows.

The positions of outliers stay on the device. In ``decode_kernel`` a tile has every row of the input, so a span of
columns is enough to find which of them are outlying. Their codes stay in the integer product; afterwards the remainder
of the input (all of an outlier, less than half a step of its neighbors) is multiplied in the input's dtype. A word with
a bit per span marks the spans with outliers.

For many rows see ``gemm``, which reads the outlying columns of ``list_kernel``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.numerics import ROUND, magnitude
from ..common.splitk import store_part, sum_parts, tile_parts


@triton.jit
def bitwise_or(a, b):
    return a | b


@triton.jit
def outside(value, threshold):
    """Return True for float32 values that are outliers. Compared as integers: Inf and NaN are above every threshold."""
    return magnitude(value) > magnitude(tl.zeros(value.shape, tl.float32) + threshold)


@triton.jit
def reciprocal(top):
    return tl.where(top > 0.0, 127.0 / tl.where(top > 0.0, top, 1.0), 0.0)


@triton.jit
def encode(inner, inverse):
    """Return codes of float32 values that are not outliers."""
    steps = tl.minimum(tl.maximum(inner * inverse, -127.0), 127.0)
    return ((steps + ROUND) - ROUND).to(tl.int8)


@triton.jit
def spans(outlying, first, SPAN: tl.constexpr, BLOCK: tl.constexpr):
    """Return a bit per SPAN of the columns ``outlying`` [BLOCK] (int32, 0 or 1), beginning with bit ``first``."""
    marks = tl.max(tl.reshape(outlying, (BLOCK // SPAN, SPAN)), 1).to(tl.int64)
    return tl.sum(marks << (first + tl.arange(0, BLOCK // SPAN)).to(tl.int64), 0)


@triton.jit(do_not_specialize=["threshold"])
def rows_kernel(
    x, codes, scales, words, flags, threshold, K, FLAGS: tl.constexpr, SPAN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Program m computes codes and scale of row m, without its outliers.

    ``FLAGS``: ``flags`` (uint8 [K], zero before) get 1 where outliers are; else ``words`` [rows] (int64) get the spans.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < K
    value = tl.load(x + row * K + column, inside, 0.0).to(tl.float32)
    outlying = outside(value, threshold)
    inner = tl.where(outlying, 0.0, value)
    top = tl.max(tl.abs(inner), 0)
    tl.store(codes + row * K + column, encode(inner, reciprocal(top)), inside)
    tl.store(scales + row, top / 127.0)
    if FLAGS:
        # All programs that write a flag write the same value.
        tl.store(flags + column, tl.full([BLOCK], 1, tl.uint8), outlying & inside)
    else:
        tl.store(words + row, spans(outlying.to(tl.int32), 0, SPAN, BLOCK))


@triton.jit
def list_kernel(columns, count, flags, K, SCAN: tl.constexpr):
    """Write the columns with flags to ``columns`` [K], in order, and their number to ``count`` [1]; reset the flags.

    A separate launch: a scan takes registers, of which ``rows_kernel`` must use few to have many rows in flight.
    """
    total = 0
    for first in range(0, K, SCAN):
        each = first + tl.arange(0, SCAN)
        flag = tl.load(flags + each, each < K, 0).to(tl.int32)
        tl.store(columns + total + tl.cumsum(flag, 0) - 1, each, flag > 0)
        tl.store(flags + each, tl.zeros([SCAN], tl.uint8), each < K)
        total += tl.sum(flag, 0)
    tl.store(count, total)


@triton.jit
def row_tops(x, threshold, M, K, SPAN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the largest magnitudes [1, ROWS] of rows of ``x`` without outliers, and the spans that have outliers."""
    row = tl.arange(0, ROWS)[None, :]
    column = tl.arange(0, BLOCK)[:, None]
    top = tl.zeros([1, ROWS], tl.float32)
    word = tl.sum(tl.zeros([BLOCK // SPAN], tl.int64), 0)
    for k in range(0, K, BLOCK):
        inside = (row < M) & (k + column < K)
        value = tl.load(x + row.to(tl.int64) * K + k + column, inside, 0.0).to(tl.float32)
        outlying = outside(value, threshold)
        top = tl.maximum(top, tl.max(tl.abs(tl.where(outlying, 0.0, value)), 0, keep_dims=True))
        word |= spans(tl.max(outlying.to(tl.int32), 1), k // SPAN, SPAN, BLOCK)
    return top, word


@triton.jit(do_not_specialize=["threshold", "M"])
def decode_kernel(
    x, codes, x_scale, words, weight, w_scale, bias, y, partial, semaphores, threshold, M, N, K,
    QUANTIZED: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, REAL: tl.constexpr, ROWS: tl.constexpr,
    GRID_BLOCK: tl.constexpr, SPAN: tl.constexpr, PIECE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT: tl.constexpr, EVERY: tl.constexpr,
):  # fmt: skip
    """Program (i, s) computes part s of rows i * BLOCK_N of the weight, for all rows of ``x``; M <= BLOCK_M.

    ``QUANTIZED``: ``codes``, ``x_scale`` and ``words`` are those of ``rows_kernel``; else ``x`` is quantized here.
    ``ROWS`` is 1 for one row of input, whose tile is computed once and broadcast, else BLOCK_M. Other parameters as in
    ``w8a8.kernel.decode_kernel``; ``REAL`` is the type in which outliers are multiplied, ``EVERY`` has every SPLIT-th
    bit set, and PIECE columns of a span are multiplied at a time.
    """
    tile, part = tl.program_id(0), tl.program_id(1)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)[None, :]
    row = tl.arange(0, ROWS)[None, :]
    k_offsets = tl.arange(0, BLOCK_K)
    if QUANTIZED:
        scale = tl.load(x_scale + row, row < M, 0.0)
        inverse = scale
        each = tl.arange(0, ROWS)
        word = tl.reduce(tl.load(words + each, each < M, 0), 0, bitwise_or)
    else:
        top, word = row_tops(x, threshold, M, K, SPAN, ROWS, GRID_BLOCK)
        scale, inverse = top / 127.0, reciprocal(top)
    # Rows beyond the weight repeat its last one; they are not stored.
    w_rows = weight + tl.minimum(n, N - 1).to(tl.int64)[:, None] * K
    rows = row.to(tl.int64) * K
    steps = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT)
    start = part * steps * BLOCK_K
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    for k in tl.range(start, tl.minimum(start + steps * BLOCK_K, K), BLOCK_K):
        column = k + k_offsets
        inside = (row < M) & (column[:, None] < K)
        if EVEN:  # noqa: SIM108
            w = tl.load(w_rows + column[None, :])
        else:
            w = tl.load(w_rows + column[None, :], column[None, :] < K, 0)
        if QUANTIZED:
            c = tl.load(codes + rows + column[:, None], inside, 0)
        else:
            value = tl.load(x + rows + column[:, None], inside, 0.0).to(tl.float32)
            c = encode(tl.where(outside(value, threshold), 0.0, value), inverse)
        acc = tl.dot(w, tl.broadcast_to(c, (BLOCK_K, BLOCK_M)), acc, out_dtype=tl.int32)
    out = acc.to(tl.float32) * scale
    # Of the spans with outliers, each part takes every SPLIT-th.
    word &= tl.full([], EVERY, tl.int64) << part
    PIECES: tl.constexpr = SPAN // PIECE
    piece_offsets = tl.arange(0, PIECE)
    marks = tl.sum((word >> tl.arange(0, 64).to(tl.int64)) & 1, 0).to(tl.int32)
    for t in tl.range(0, marks * PIECES):
        lowest = word & -word
        # The exponent of a power of two is its logarithm (2^63 is negative, of the same exponent).
        span = (magnitude(lowest.to(tl.float32)) >> 23) - 127
        column = span * SPAN + t % PIECES * PIECE + piece_offsets
        word = tl.where(t % PIECES == PIECES - 1, word ^ lowest, word)
        inside = (row < M) & (column[:, None] < K)
        w = tl.load(w_rows + column[None, :], column[None, :] < K, 0)
        v = tl.load(x + rows + column[:, None], inside, 0.0).to(tl.float32)
        outlying = outside(v, threshold)
        if QUANTIZED:
            c = tl.load(codes + rows + column[:, None], inside, 0)
        else:
            c = encode(tl.where(outlying, 0.0, v), inverse)
        marked = tl.max(outlying.to(tl.int32), 1, keep_dims=True) > 0
        rest = tl.where(marked, v - c.to(tl.float32) * scale, 0.0).to(REAL)
        out = tl.dot(w.to(REAL), tl.broadcast_to(rest, (PIECE, BLOCK_M)), out, input_precision="ieee")
    last = True
    if SPLIT > 1:
        parts = tile_parts(partial, tile, BLOCK_M, BLOCK_N, SPLIT)
        last = store_part(out, parts, part, semaphores, tile, SPLIT)
    if last:
        if SPLIT > 1:
            out = sum_parts(out, parts, semaphores, tile, SPLIT)
        column = n[:, None]
        there = column < N
        out *= tl.load(w_scale + column, there, 0.0)
        if HAS_BIAS:
            out += tl.load(bias + column, there, 0.0).to(tl.float32)
        tl.store(y + m.to(tl.int64) * N + column, out.to(y.dtype.element_ty), there & (m < M))
