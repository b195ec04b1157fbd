"""The Triton kernel of attention to a quantized cache (specified by ``naive.attend``).

Attention is split over pieces of the cache, as in ``decode_attention``; each ``TAIL`` tokens in full precision behind
the pieces of codes are one more. A program is one warp, whose tiles are loaded ahead of it, so that nothing waits for
another warp. Tokens are the rows of the tensor cores' left operand: codes are decoded in the registers where they are
multiplied, and queries are padded to eight only.

What a code stands for is not computed. A code of channel d and group g is worth ``scale[g,d] (code - offset) +
zero[g,d]``, so queries are multiplied by the scales of a group, once for all of its tokens, and codes enter the product
as they are,

    score = sum_d (q[d] scale[g,d]) code[d]  +  sum_d q[d] zero[g,d] - offset sum_d q[d] scale[g,d],

in which the terms on the right are those of the group. The scale of a token's values is part of the exponent of its
weight, and their offset and zero point are sums of weights,

    p[t] = 2^(score[t] + log2 scale[t] - base),
    (sum_t p[t] code[t] - offset sum_t p[t] + sum_t p[t] zero[t] / scale[t]) / sum_t (p[t] / scale[t]).

Queries are divided by their largest channel, so that float16 holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP16, FP32
from .numbers import power_of_2
from .sub_blocks import NO_SCORE, add_pairs, add_values, capped, group_query, sub_scores, zero_points

# The largest weight is 2^HEADROOM: small ones have that many more bits in float16.
HEADROOM = tl.constexpr(10.0)
# Positions of the mask that are read at once.
MASK_BLOCK = tl.constexpr(1024)


@triton.jit
def _write(part, sums, acc, total, base, piece, b, g, token, head, real, dv, G, H, DV, Q: tl.constexpr):
    """Store a piece's sums ``acc`` [DVP, ROWS] and ``total`` [ROWS] of weights 2^(score - base)."""
    at = (b * Q + token) * H + head
    where = at[None, :].to(tl.int64) * DV + dv[:, None]
    size = (tl.num_programs(1) // G).to(tl.int64) * Q * H
    tl.store(part + piece * size * DV + where, acc, mask=real[None, :] & (dv < DV)[:, None])
    tl.store(sums + (piece * size + at) * 2, base, mask=real)
    tl.store(sums + (piece * size + at) * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["N", "TILES", "WIDTH", "SPLIT", "NEW", "m_b", "m_n"])
def _attend_kernel(
    query, state, key_words, key_scale, key_zero, value_words, value_scale, value_zero, tail_keys, tail_values, mask,
    sinks, part, sums, scale, softcap, H, G, D, DV, N, TILES, WIDTH, SPLIT, NEW, q_b, q_h, q_n, m_b, m_n,
    GROUP: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, SUB: tl.constexpr,
    PER: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, PER_TOKEN: tl.constexpr, KGROUP: tl.constexpr,
    STEP: tl.constexpr, RESIDUAL: tl.constexpr, RING: tl.constexpr, ZEROS: tl.constexpr, TAIL: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, MATH: tl.constexpr,
    TAIL_MATH: tl.constexpr, ASM: tl.constexpr, EVEN: tl.constexpr, ODD: tl.constexpr,
    VALUE_EVEN: tl.constexpr, VALUE_ODD: tl.constexpr, SIGNED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Attention over one piece of the cache: ``WIDTH`` tiles of codes, or tokens in full precision.

    Rows are heads of a key head times queries; the pieces from ``SPLIT`` on share those in full precision, ``TAIL``
    tokens at a time.
    ``state`` int32 [3]: tokens before the ``NEW`` ones, and tokens with codes then. ``scale`` includes log2(e).
    ``part`` [pieces, B Q H, DV] float32, ``sums`` [pieces, B Q H, 2].
    """
    if EARLY:  # the launch that adds up pieces waits for them itself
        tl.extra.cuda.gdc_launch_dependents()
    piece, pair = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    TILE: tl.constexpr = PER * SUB
    # Whether a tile has codes of all its tokens, or of none.
    WHOLE: tl.constexpr = STEP % TILE == 0
    OFFSET: tl.constexpr = 0 if FLOAT8 or (BITS == 4 and ZEROS) else 1 << (BITS - 1)
    tokens = tl.minimum(tl.load(state) + NEW, N)
    coded = tl.maximum(tl.load(state + 1), tl.maximum((tokens - RESIDUAL) // STEP * STEP, 0))
    rows = tl.arange(0, ROWS)
    head, token = g * GROUP + rows // Q, rows % Q
    real = rows < GROUP * Q
    d, dv = tl.arange(0, DP), tl.arange(0, DVP)
    q_at = query + b.to(tl.int64) * q_b + head[None, :] * q_h + token[None, :] * q_n + d[:, None]
    # Loaded in each branch: shared memory that the other branch needs would leave fewer programs on a multiprocessor.
    q_real = real[None, :] & (d < D)[:, None]
    mask += b.to(tl.int64) * m_b
    pair_at = pair.to(tl.int64)
    if piece < SPLIT:
        first_row = tl.arange(0, SUB)
        first = piece * WIDTH * TILE
        end = tl.minimum(first + WIDTH * TILE, coded)
        low, high, mask_end = first, end, 0
        if HAS_MASK:
            # The positions that any query of the piece may attend to. The loads do not wait for the number of tokens.
            none = tl.zeros((), tl.int32)
            low, high, count = none + N, none, none
            for start in tl.range(first, tl.minimum(first + WIDTH * TILE, N), MASK_BLOCK, num_stages=1):
                at = start + tl.arange(0, MASK_BLOCK)
                for token_at in tl.static_range(Q):
                    wanted = tl.load(mask + token_at * m_n + at, mask=(at < first + WIDTH * TILE) & (at < N), other=0)
                    seen = (wanted != 0) & (at < end)
                    low = tl.minimum(low, tl.min(tl.where(seen, at, N)))
                    high = tl.maximum(high, tl.max(tl.where(seen, at + 1, 0)))
                    count += tl.sum(seen.to(tl.int32))
            mask_end = tl.where(count < (high - low) * Q, high, 0)  # without holes, nothing more is read of it
        wide = tl.load(q_at, mask=q_real, other=0.0).to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=0)
        largest = tl.where(largest == 0.0, 1.0, largest)
        if PER_TOKEN:
            scales, zeros = key_scale + pair_at * TILES * TILE, key_zero + pair_at * TILES * TILE
        else:
            groups = TILES * TILE // KGROUP
            scales, zeros = key_scale + pair_at * groups * DP, key_zero + pair_at * groups * DP
        wide = wide / largest[None, :]
        qs = wide.to(tl.float16) if MATH == FP16 else wide
        row_scale = largest * scale
        # Scales differ little from group to group: over the first's largest (a power of two), float16 holds them.
        key_range = 1.0
        if not PER_TOKEN:
            nearby = tl.load(scales + tl.minimum(low, tl.maximum(coded - 1, 0)) // KGROUP * DP + d)
            largest_scale = tl.minimum(tl.maximum(tl.max(nearby), 8.673617379884035e-19), 1.152921504606847e18)
            key_range = (largest_scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        over_range = 1.0 / key_range
        code_scale = row_scale * key_range
        acc = tl.zeros((DVP, ROWS), tl.float32)
        total = tl.zeros((SUB, ROWS), tl.float32)
        zero_sum = tl.zeros((SUB, ROWS), tl.float32)
        code_sum = tl.zeros((SUB, ROWS), tl.float32)
        base = tl.full((ROWS,), float("-inf"), tl.float32)
        keys = key_words + pair_at * TILES * (SUB * DP) + first_row[:, None] * DP + d[None, :]
        values = value_words + pair_at * TILES * (SUB * DVP) + dv[:, None] * SUB + first_row[None, :]
        v_scales, v_zeros = value_scale + pair_at * TILES * TILE, value_zero + pair_at * TILES * TILE
        for tile in range(low // TILE, (high + TILE - 1) // TILE):
            k = tl.load(keys + tile * SUB * DP)
            z0 = zero_points(v_zeros, 0, tile, first_row, end, SUB, PER, ZEROS, WHOLE)
            z1 = zero_points(v_zeros, 1, tile, first_row, end, SUB, PER, ZEROS, WHOLE)
            if PER == 4:
                z2 = zero_points(v_zeros, 2, tile, first_row, end, SUB, PER, ZEROS, WHOLE)
                z3 = zero_points(v_zeros, 3, tile, first_row, end, SUB, PER, ZEROS, WHOLE)
            group = tile * TILE // KGROUP
            q0, r0 = group_query(qs, over_range, row_scale, code_scale, scales, zeros, group, d, SUB, DP, OFFSET,
                                 PER_TOKEN, ZEROS)  # fmt: skip
            s0, c0, x0 = sub_scores(k, 0, EVEN, VALUE_EVEN, 0.0, tile, q0, r0, row_scale, code_scale, scales,
                                zeros, v_scales, mask, first_row, low, high, end, token, real, softcap, m_n,
                                mask_end, OFFSET, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, ZEROS, WHOLE, HAS_MASK,
                                HAS_CAP, MATH, ASM)  # fmt: skip
            s1, c1, _ = sub_scores(k, 1, ODD, VALUE_ODD, x0, tile, q0, r0, row_scale, code_scale, scales,
                                zeros, v_scales, mask, first_row, low, high, end, token, real, softcap, m_n,
                                mask_end, OFFSET, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, ZEROS, WHOLE, HAS_MASK,
                                HAS_CAP, MATH, ASM)  # fmt: skip
            highest = tl.maximum(s0, s1)
            if PER == 4:
                q2, r2 = q0, r0
                if KGROUP < TILE and not PER_TOKEN:
                    q2, r2 = group_query(qs, over_range, row_scale, code_scale, scales, zeros, group + 1, d, SUB, DP,
                                         OFFSET, PER_TOKEN, ZEROS)  # fmt: skip
                s2, c2, x2 = sub_scores(k, 2, EVEN, VALUE_EVEN, 0.0, tile, q2, r2, row_scale, code_scale, scales,
                                    zeros, v_scales, mask, first_row, low, high, end, token, real, softcap, m_n,
                                    mask_end, OFFSET, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, ZEROS, WHOLE, HAS_MASK,
                                    HAS_CAP, MATH, ASM)  # fmt: skip
                s3, c3, _ = sub_scores(k, 3, ODD, VALUE_ODD, x2, tile, q2, r2, row_scale, code_scale, scales,
                                    zeros, v_scales, mask, first_row, low, high, end, token, real, softcap, m_n,
                                    mask_end, OFFSET, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, ZEROS, WHOLE, HAS_MASK,
                                    HAS_CAP, MATH, ASM)  # fmt: skip
                highest = tl.maximum(highest, tl.maximum(s2, s3))
            new_base = tl.maximum(base, tl.max(highest, axis=0) - HEADROOM)
            # Rows that have seen nothing yet have -inf, of which a difference is NaN.
            finite = tl.where(new_base == float("-inf"), 0.0, new_base)
            shrink = power_of_2(base - finite, ASM)[None, :]
            # Loaded here, values take no registers before.
            v = tl.load(values + tile * SUB * DVP)
            acc, total, code_sum = acc * shrink, total * shrink, code_sum * shrink
            if ZEROS:
                zero_sum *= shrink
            if PER == 4:
                acc, total, zero_sum, code_sum = add_pairs(v, 0, VALUE_EVEN, VALUE_ODD, s0, s1, c0, c1, z0, z1, finite,
                                                           acc, total, zero_sum, code_sum, SUB, BITS, FLOAT8, ZEROS,
                                                           MATH, ASM)  # fmt: skip
                acc, total, zero_sum, code_sum = add_pairs(v, 2, VALUE_EVEN, VALUE_ODD, s2, s3, c2, c3, z2, z3, finite,
                                                           acc, total, zero_sum, code_sum, SUB, BITS, FLOAT8, ZEROS,
                                                           MATH, ASM)  # fmt: skip
            else:
                acc, total, zero_sum, code_sum = add_values(v, 0, VALUE_EVEN, s0, c0, z0, finite, acc, total,
                                                            zero_sum, code_sum, SUB, BITS, FLOAT8, SIGNED, ZEROS,
                                                            MATH, ASM)  # fmt: skip
                acc, total, zero_sum, code_sum = add_values(v, 1, VALUE_ODD, s1, c1, z1, finite, acc, total,
                                                            zero_sum, code_sum, SUB, BITS, FLOAT8, SIGNED, ZEROS,
                                                            MATH, ASM)  # fmt: skip
            base = new_base
        if OFFSET != 0 and not SIGNED:
            # All rows of ``code_sum`` are equal.
            acc -= OFFSET * tl.max(code_sum, axis=0)[None, :]
        if ZEROS:
            acc += tl.sum(zero_sum, axis=0)[None, :]
        _write(part, sums, acc, tl.sum(total, axis=0), base, piece, b, g, token, head, real, dv, G, H, DV, Q)
    else:
        q = tl.load(q_at, mask=q_real, other=0.0)
        if TAIL_MATH == FP32:
            q = q.to(tl.float32)
        top = tl.full((ROWS,), float("-inf"), tl.float32)
        weight = tl.zeros((ROWS,), tl.float32)
        if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the piece
            if piece == SPLIT:
                top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
                weight = tl.full((ROWS,), 1.0, tl.float32)
        acc = tl.zeros((DVP, ROWS), tl.float32)
        step = (tl.num_programs(0) - SPLIT) * TAIL
        for start in tl.range(coded + (piece - SPLIT) * TAIL, tokens, step, num_stages=1):
            t = start + tl.arange(0, TAIL)
            allowed = (t < tokens)[:, None] & real[None, :]
            if HAS_MASK:
                allowed &= tl.load(mask + token[None, :] * m_n + t[:, None], mask=allowed, other=0) != 0
            slot = t % RING
            key = tl.load(
                tail_keys + pair_at * RING * D + slot[:, None] * D + d[None, :],
                mask=(t < tokens)[:, None] & (d < D)[None, :], other=0.0,
            )  # fmt: skip
            # A value that nobody may see is not multiplied: it may be NaN.
            seen = tl.max(allowed.to(tl.int32), axis=1) != 0
            value = tl.load(
                tail_values + pair_at * RING * DV + slot[None, :] * DV + dv[:, None],
                mask=seen[None, :] & (dv < DV)[:, None], other=0.0,
            )  # fmt: skip
            if TAIL_MATH == FP32:
                key, value = key.to(tl.float32), value.to(tl.float32)
            s = capped(tl.dot(key, q, input_precision="ieee") * scale, softcap, HAS_CAP)
            s = tl.where(allowed, s, NO_SCORE)
            new_top = tl.maximum(top, tl.max(s, axis=0))
            finite = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.exp2(s - finite[None, :])
            shrink = tl.exp2(top - finite)
            weight = weight * shrink + tl.sum(p, axis=0)
            acc = tl.dot(value, p.to(value.dtype), acc * shrink[None, :], input_precision="ieee")
            top = new_top
        _write(part, sums, acc, weight, top, piece, b, g, token, head, real, dv, G, H, DV, Q)
