"""Buckets of a block of vectors: by random rotations, in whole numbers, or by the nearest centroid."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32

# 1.5 * 2^52: a float64 that is added and subtracted leaves the nearest whole number, of halves the even one.
ROUNDING = tl.constexpr(6755399441055744.0)


# Below any sum, times 128.
LEAST = tl.constexpr(-(1 << 62))


@triton.jit
def _digits(whole):
    """Return whole numbers up to 2^22 as three digits to base 256, from -128 to 127, whose products are exact."""
    first = ((whole + 128) & 255) - 128
    whole = (whole - first) >> 8
    second = ((whole + 128) & 255) - 128
    third = (whole - second) >> 8
    return first.to(tl.int8), second.to(tl.int8), third.to(tl.int8)


@triton.jit
def _hashed(sums, column, BEGIN: tl.constexpr, HALF: tl.constexpr):
    """Return the hash of each row: the largest of HALF columns from BEGIN on and of their negatives, the first of equal
    ones. Sums are below 2^50, so that 127 less the hash fits behind them in one number.

    The hash comes out of the largest number with no constant added: ptxas 12.8 to 13.0 loses the constant of
    ``add.s16x2`` where one half of the result is read, as of bytes and 16-bit numbers that LLVM pairs.
    """
    inside = ((column >= BEGIN) & (column < BEGIN + HALF))[None, :]
    place = (127 + BEGIN - column).to(tl.int64)[None, :]
    either = tl.maximum(sums * 128 + place, place - HALF - sums * 128)
    return 127 - (tl.max(tl.where(inside, either, LEAST), axis=1) & 127).to(tl.int32)


@triton.jit
def _hash_kernel(
    vectors, rotations, buckets, H, N, D, rounds, columns, blocks, x_b, x_h, x_n,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, COLUMNS: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
):  # fmt: skip
    """Programs are (block of vectors, batch row and head); ``buckets`` int16 [B, H, rounds, N]. FIRST and SECOND are
    factors of the number of buckets; SECOND 0: there is one. Sums of products of digits are those of int32.
    """
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    n, d, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, COLUMNS)
    at = vectors + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + n.to(tl.int64)[:, None] * x_n + d[None, :]
    x = tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0).to(tl.float64)
    most = tl.max(tl.abs(x), axis=1)
    scaled = x / tl.where(most == 0.0, 1.0, most)[:, None] * 4194304.0
    whole = ((scaled + ROUNDING) - ROUNDING).to(tl.int32)
    x_0, x_1, x_2 = _digits(whole)
    for number in range(0, rounds):
        at_r = rotations + ((h * D + d) * rounds + number)[:, None] * columns + column[None, :]
        r = tl.load(at_r, mask=(d < D)[:, None] & (column < columns)[None, :], other=0)
        r_0, r_1, r_2 = _digits(r)
        low = tl.dot(x_0, r_0) + 256 * (tl.dot(x_0, r_1) + tl.dot(x_1, r_0))
        middle = tl.dot(x_0, r_2) + tl.dot(x_1, r_1) + tl.dot(x_2, r_0) + 256 * (tl.dot(x_1, r_2) + tl.dot(x_2, r_1))
        sums = low.to(tl.int64) + (middle.to(tl.int64) << 16) + (tl.dot(x_2, r_2).to(tl.int64) << 32)
        found = _hashed(sums, column, 0, FIRST // 2)
        if SECOND > 0:
            found += FIRST * _hashed(sums, column, FIRST // 2, SECOND // 2)
        own = buckets + (pair * rounds + number).to(tl.int64) * N + n
        tl.store(own, found.to(tl.int16), mask=n < N)


@triton.jit
def _nearest_kernel(
    vectors, centroids, found, H, G, N, D, C, blocks, x_b, x_h, x_n,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Programs are (block of vectors, batch row and head); ``found`` int16 [B, H, N], STEP centroids at a time.

    For vectors in half precision, centroids are sums of three numbers of it.
    """
    block, pair = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    b, h = pair // H, pair % H
    n, d, column = block * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, STEP)
    at = vectors + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + n.to(tl.int64)[:, None] * x_n + d[None, :]
    x = tl.load(at, mask=(n < N)[:, None] & (d < D)[None, :], other=0.0)
    if MATH == FP32:
        x = x.to(tl.float32)
    best = tl.full((ROWS,), float("-inf"), tl.float32)
    which = tl.zeros((ROWS,), tl.int32)
    for start in range(0, C, STEP):
        c = start + column
        own = centroids + ((h // (H // G)) * C + c)[:, None] * D + d[None, :]
        y = tl.load(own, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0)
        part = y.to(x.dtype)
        near = tl.dot(x, tl.trans(part), input_precision="ieee")
        if MATH != FP32:
            y -= part.to(tl.float32)
            part = y.to(x.dtype)
            near += tl.dot(x, tl.trans(part))
            part = (y - part.to(tl.float32)).to(x.dtype)
            near += tl.dot(x, tl.trans(part))
        near = tl.where((c < C)[None, :], near, float("-inf"))
        most = tl.max(near, axis=1)
        place = tl.min(tl.where(near == most[:, None], c[None, :], 1 << 20), axis=1)
        which = tl.where(most > best, place, which)
        best = tl.maximum(best, most)
    tl.store(found + pair.to(tl.int64) * N + n, which.to(tl.int16), mask=n < N)
