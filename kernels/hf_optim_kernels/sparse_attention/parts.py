"""What the kernels share: the tokens at the places of a block, and which pairs of a tile see each other.

A tile has rows and columns of places; one side are queries, the other keys, and each kernel says which. Bits are stored
by row, so that a thread reads the words of its own rows.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tokens_at(order, kind, places, place, count, HAS_ORDER: tl.constexpr):
    """Return the token at each place of head layout ``kind``, and which places are not empty.

    ``order`` [L or 1, places]; ``places`` is 0 if there is one order for all layouts. Tokens of empty places are not
    addresses; without an order tokens are consecutive, which loads of several in one instruction need to see.
    """
    token = place
    real = place < count
    if HAS_ORDER:
        token = tl.load(order + kind * places + place)
        real = token >= 0
    return token, real


@triton.jit
def rows_at(base, start, token, inside, stride, d, HAS_ORDER: tl.constexpr):
    """Return the addresses of rows of a matrix, [places, columns]: of tokens, or of a block from ``start`` on."""
    if HAS_ORDER:
        found = base + tl.maximum(token, 0).to(tl.int64)[:, None] * stride + d[None, :]
    else:  # within a block offsets are small and the same in each; where it begins may be beyond 2^31
        found = (base + tl.cast(start, tl.int64) * stride) + ((inside * stride)[:, None] + d[None, :])
    return found


@triton.jit
def load_rows(at, real, d, SIZE, CHECKED: tl.constexpr, FULL: tl.constexpr, WIDE: tl.constexpr):
    """Return rows [places, BLOCK_D] of a matrix, zeros at empty places if CHECKED; WIDE: in float32.

    FULL: the matrix has as many columns as the block.
    """
    if CHECKED:
        if FULL:
            found = tl.load(at, mask=real[:, None], other=0.0)
        else:
            found = tl.load(at, mask=real[:, None] & (d < SIZE)[None, :], other=0.0)
    elif FULL:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(d < SIZE)[None, :], other=0.0)
    if WIDE:
        found = found.to(tl.float32)
    return found


@triton.jit
def numbers_at(base, token, real, other, CHECKED: tl.constexpr):
    """Return a number of each token, ``other`` at empty places if CHECKED."""
    if CHECKED:  # noqa: SIM108 - one of the two is compiled
        found = tl.load(base + token, mask=real, other=other)
    else:
        found = tl.load(base + token)
    return found


@triton.jit
def segments_at(segments, token, real, NONE: tl.constexpr, CHECKED: tl.constexpr):
    """Return the segment of each token, NONE (a negative number that the other side does not have) for padding."""
    found = numbers_at(segments, token, real, -1, CHECKED)
    return tl.where(found < 0, NONE, found)


@triton.jit
def bits_of(bits, number, row, column, BLOCK: tl.constexpr):
    """Return the mask ``number`` at rows and columns of a block, bool [rows, columns]; all True if it is negative.

    Of each row its words are loaded, and of each pair a shift is left: the word of a column is known when compiled.
    """
    WORDS: tl.constexpr = BLOCK // 32
    own = bits + tl.maximum(number, 0).to(tl.int64) * (BLOCK * WORDS) + row * WORDS
    partial = number + 0 * row >= 0
    word = tl.load(own, mask=partial, other=-1)[:, None]
    if WORDS > 1:
        word = tl.where((column < 32)[None, :], word, tl.load(own + 1, mask=partial, other=-1)[:, None])
    if WORDS > 2:
        third = tl.load(own + 2, mask=partial, other=-1)[:, None]
        fourth = tl.load(own + 3, mask=partial, other=-1)[:, None]
        word = tl.where((column < 64)[None, :], word, tl.where((column < 96)[None, :], third, fourth))
    return ((word >> (column % 32)[None, :]) & 1) != 0


@triton.jit
def ramp_of(ramp, head, HAS_RAMP: tl.constexpr):
    """Return reach, slope and limit of a head in ``ramp`` [H, 3]; zeros if there is none."""
    reach, slope, limit = 0.0, 0.0, 0.0
    if HAS_RAMP:
        reach, slope, limit = tl.load(ramp + head * 3), tl.load(ramp + head * 3 + 1), tl.load(ramp + head * 3 + 2)
    return reach, slope, limit


@triton.jit
def weights_of(token_rows, token_columns, reach, slope, limit):
    """Return ``(reach - x) slope`` of the distances x of a tile, 0 from ``limit`` on: above 1 it counts as 1."""
    away = tl.abs(token_rows[:, None] - token_columns[None, :]).to(tl.float32)
    return tl.where(away < limit, (reach - away) * slope, 0.0)
