"""Parts of the attention kernel: scores and weighted values of the tokens of one place of a tile's words."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import log_2, numbers, power_of_2, reciprocal

NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def capped(s, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        # tanh by exp2; softcap includes log2(e) as the scale does.
        bounded = tl.minimum(tl.maximum(s / softcap, -15.0), 15.0)
        e = tl.exp2(bounded * 2.8853900817779268)
        s = softcap * ((e - 1.0) / (e + 1.0))
    return s


@triton.jit
def group_query(
    q, over_range, row_scale, code_scale, scales, zeros, group, d, SUB: tl.constexpr, DP: tl.constexpr,
    OFFSET: tl.constexpr, PER_TOKEN: tl.constexpr, ZEROS: tl.constexpr,
):  # fmt: skip
    """Return queries times the scales of a group [DP, ROWS], and the group's terms of scores [SUB, ROWS].

    With scales of tokens, the queries and their sums over channels. ``over_range`` is ``row_scale`` over
    ``code_scale``, a power of two by which scales are about 1.
    """
    # Sums over channels are products with equal rows: their result is where scores are.
    rest = tl.zeros((SUB, q.shape[1]), tl.float32)
    if PER_TOKEN:
        scaled = q
        rest = tl.dot(tl.full((SUB, DP), 1.0, q.dtype), q, input_precision="ieee")
    else:
        # Two products of float16 are one instruction; a scale's rounding is that of its product again.
        scaled = q * (tl.load(scales + group * DP + d) * over_range).to(q.dtype)[:, None]
        if OFFSET != 0:
            rest = tl.dot(tl.full((SUB, DP), -OFFSET, q.dtype), scaled, input_precision="ieee") * code_scale[None, :]
        if ZEROS:
            zero = tl.load(zeros + group * DP + d).to(q.dtype)
            zero_rest = tl.dot(tl.broadcast_to(zero[None, :], (SUB, DP)), q, input_precision="ieee")
            rest += zero_rest * row_scale[None, :]
    return scaled, rest


@triton.jit
def sub_scores(
    words, PLACE: tl.constexpr, UNIT: tl.constexpr, VALUE_UNIT: tl.constexpr, before, tile, q, rest, row_scale,
    code_scale, scales, zeros, value_scale, mask, first_row, low, high, end, token, real, softcap, m_n, mask_end,
    OFFSET: tl.constexpr, Q: tl.constexpr, SUB: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr,
    FLOAT8: tl.constexpr, PER_TOKEN: tl.constexpr, ZEROS: tl.constexpr, WHOLE: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return scores plus log2 of the values' scales [SUB, ROWS], -inf where masked, those scales [SUB], and products.

    Both scales are those of what ``numbers`` returns. ``before``: products of the place before, which those of an odd
    place of four bits contain.
    """
    k = numbers(words, PLACE, BITS, FLOAT8, False, UNIT, MATH, ASM)
    t = (tile * PER + PLACE) * SUB + first_row
    inside = t < end
    raw = tl.dot(k, q, input_precision="ieee")
    if BITS == 4 and PLACE % 2 == 1:
        raw -= before
    if PER_TOKEN:
        scale = tl.load(scales + t) if WHOLE else tl.load(scales + t, mask=inside, other=0.0)
        shift = -OFFSET * scale
        if ZEROS:
            shift += tl.load(zeros + t) if WHOLE else tl.load(zeros + t, mask=inside, other=0.0)
        s = (raw * (scale * UNIT)[:, None] + rest * shift[:, None]) * row_scale[None, :]
    else:
        s = raw * (code_scale * UNIT)[None, :] + rest
    s = capped(s, softcap, HAS_CAP)
    v_scale = tl.load(value_scale + t) if WHOLE else tl.load(value_scale + t, mask=inside, other=1.0)
    v_scale *= VALUE_UNIT
    s += log_2(v_scale, ASM)[:, None]
    if HAS_MASK:
        inside = (t >= low) & (t < high)
        if Q == 1:
            inside &= tl.load(mask + t, mask=inside & (t < mask_end), other=1) != 0
        allowed = inside[:, None] & real[None, :]
        if Q > 1:
            read = allowed & (t < mask_end)[:, None]
            allowed &= tl.load(mask + token[None, :] * m_n + t[:, None], mask=read, other=1) != 0
        s = tl.where(allowed, s, NO_SCORE)
    elif not WHOLE:
        s = tl.where(inside[:, None], s, NO_SCORE)
    return s, v_scale, raw


@triton.jit
def zero_points(
    value_zero, PLACE: tl.constexpr, tile, first_row, end, SUB: tl.constexpr, PER: tl.constexpr, ZEROS: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Return the zero points of a sub-block's values [SUB]; loaded long before they are used."""
    t = (tile * PER + PLACE) * SUB + first_row
    zero = tl.zeros((SUB,), tl.float32)
    if ZEROS:
        zero = tl.load(value_zero + t) if WHOLE else tl.load(value_zero + t, mask=t < end, other=0.0)
    return zero


@triton.jit
def add_values(
    words, PLACE: tl.constexpr, UNIT: tl.constexpr, s, scale, zero, base, acc, total, zero_sum, code_sum,
    SUB: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, SIGNED: tl.constexpr, ZEROS: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add a sub-block's weighted codes to ``acc`` [DVP, ROWS], and its weights to the sums [SUB, ROWS]."""
    p = power_of_2(s - base[None, :], ASM)
    inverse = reciprocal(scale, ASM)
    total += p * inverse[:, None]
    if ZEROS:
        zero_sum += p * (inverse * zero)[:, None]
    v = numbers(words, PLACE, BITS, FLOAT8, SIGNED, UNIT, MATH, ASM)
    weights = p.to(v.dtype)
    if not SIGNED and not FLOAT8:
        # The sum of the weights that the codes were multiplied by, in every row.
        ones = tl.full((SUB, SUB), 1.0 / UNIT, v.dtype)
        code_sum = tl.dot(ones, weights, code_sum, input_precision="ieee")
    return tl.dot(v, weights, acc, input_precision="ieee"), total, zero_sum, code_sum


@triton.jit
def add_pairs(
    words, PLACE: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr, s0, s1, scale0, scale1, zero0, zero1, base, acc,
    total, zero_sum, code_sum, SUB: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the sub-blocks of an even place of four bits and of the next one, as ``add_values`` does one.

    ``numbers`` of the odd place contain those of the even one, so the latter's weights are less the former's.
    """
    p0, p1 = power_of_2(s0 - base[None, :], ASM), power_of_2(s1 - base[None, :], ASM)
    inverse0, inverse1 = reciprocal(scale0, ASM), reciprocal(scale1, ASM)
    total += p0 * inverse0[:, None] + p1 * inverse1[:, None]
    if ZEROS:
        zero_sum += p0 * (inverse0 * zero0)[:, None] + p1 * (inverse1 * zero1)[:, None]
    v0 = numbers(words, PLACE, BITS, FLOAT8, False, EVEN, MATH, ASM)
    v1 = numbers(words, PLACE + 1, BITS, FLOAT8, False, ODD, MATH, ASM)
    w0, w1 = (p0 - p1).to(v0.dtype), p1.to(v1.dtype)
    if not ZEROS:
        # The sum of the weights that the codes were multiplied by, in every row.
        ones0 = tl.full((SUB, SUB), 1.0 / EVEN, v0.dtype)
        ones1 = tl.full((SUB, SUB), 1.0 / EVEN + 1.0 / ODD, v1.dtype)
        code_sum = tl.dot(ones0, w0, code_sum, input_precision="ieee")
        code_sum = tl.dot(ones1, w1, code_sum, input_precision="ieee")
    acc = tl.dot(v0, w0, acc, input_precision="ieee")
    return tl.dot(v1, w1, acc, input_precision="ieee"), total, zero_sum, code_sum
