"""The Triton kernels of ``kv_cache`` (specified by ``naive``): attend to codes, and append tokens.

Attention is split over pieces of the cache, as in ``decode_attention``; the last piece is the tail in full precision.
Tokens are the rows of the tensor cores' left operand, so that codes are decoded in the registers where they are
multiplied. The scale and zero point of a channel of the keys are one more instruction for two codes there; those of a
token multiply its score, and the scale of its values is part of the exponent of its weight,

    p[t] = 2^(s[t] + log2 scale[t] - top),    sum_t p[t] code[t] / sum_t (p[t] / scale[t]).

Queries are divided by their largest channel, so that float16 holds them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP16, FP32
from .numbers import float8_code, multiply, multiply_add, numbers, rounded

NO_SCORE = tl.constexpr(float("-inf"))


@triton.jit
def _capped(s, softcap, HAS_CAP: tl.constexpr):
    if HAS_CAP:
        # tanh by exp2; softcap includes log2(e) as the scale does.
        bounded = tl.minimum(tl.maximum(s / softcap, -15.0), 15.0)
        e = tl.exp2(bounded * 2.8853900817779268)
        s = softcap * ((e - 1.0) / (e + 1.0))
    return s


@triton.jit
def _allowed(mask, t, end, token, real, m_n, Q: tl.constexpr, HAS_MASK: tl.constexpr):
    """Return which rows may attend to the positions ``t`` [SUB]: [SUB, ROWS]."""
    inside = t < end
    allowed = inside[:, None] & real[None, :]
    if HAS_MASK:
        if Q == 1:
            allowed = (tl.load(mask + t, mask=inside, other=0) != 0)[:, None] & real[None, :]
        else:
            allowed &= tl.load(mask + token[None, :] * m_n + t[:, None], mask=allowed, other=0) != 0
    return allowed


@triton.jit
def _sub_scores(
    words, PLACE: tl.constexpr, tile, q, row_scale, sums, scales, zeros, value_scale, mask, d, first_row, end, token,
    real, softcap, m_n,
    Q: tl.constexpr, SUB: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr,
    PER_TOKEN: tl.constexpr, KGROUP: tl.constexpr, DP: tl.constexpr, ZEROS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_CAP: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return scores plus log2 of the values' scales of a sub-block [SUB, ROWS], -inf where masked."""
    k = numbers(words, PLACE, BITS, FLOAT8, MATH, ASM)
    at = (tile * PER + PLACE) * SUB
    t = at + first_row
    inside = t < end
    UNIT: tl.constexpr = 256.0 if FLOAT8 else 1.0
    if PER_TOKEN:
        s = tl.dot(k, q, input_precision="ieee")
        s *= tl.load(scales + t, mask=inside, other=0.0)[:, None] * UNIT
        if ZEROS:
            s += tl.load(zeros + t, mask=inside, other=0.0)[:, None] * sums
    else:
        group = at // KGROUP
        factor = (tl.load(scales + group * DP + d) * UNIT).to(k.dtype)
        if ZEROS:
            k = multiply_add(k, factor, tl.load(zeros + group * DP + d).to(k.dtype), ASM)
        else:
            k = multiply(k, factor, ASM)
        s = tl.dot(k, q, input_precision="ieee")
    s = _capped(s * row_scale[None, :], softcap, HAS_CAP)
    s += tl.log2(tl.load(value_scale + t, mask=inside, other=1.0) * UNIT)[:, None]
    return tl.where(_allowed(mask, t, end, token, real, m_n, Q, HAS_MASK), s, NO_SCORE)


@triton.jit
def _add_values(
    words, PLACE: tl.constexpr, tile, s, base, acc, total, extra, value_scale, value_zero, first_row, end,
    SUB: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add a sub-block's weighted values to ``acc`` [DVP, ROWS], its weights to ``total`` [SUB, ROWS]."""
    t = (tile * PER + PLACE) * SUB + first_row
    UNIT: tl.constexpr = 256.0 if FLOAT8 else 1.0
    p = tl.exp2(s - base[None, :])
    inverse = 1.0 / (tl.load(value_scale + t, mask=t < end, other=1.0) * UNIT)
    weights = p * inverse[:, None]
    total += weights
    if ZEROS:
        extra += weights * tl.load(value_zero + t, mask=t < end, other=0.0)[:, None]
    v = numbers(words, PLACE, BITS, FLOAT8, MATH, ASM)
    return tl.dot(v, p.to(v.dtype), acc, input_precision="ieee"), total, extra


@triton.jit(do_not_specialize=["N", "NEW", "m_b", "m_n"])
def _attend_kernel(
    query, state, key_words, key_scale, key_zero, value_words, value_scale, value_zero, tail_keys, tail_values, mask,
    sinks, part, sums, scale, softcap, H, G, D, DV, N, TILES, WIDTH, NEW, q_b, q_h, q_n, m_b, m_n,
    GROUP: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, DP: tl.constexpr, DVP: tl.constexpr, SUB: tl.constexpr,
    PER: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, PER_TOKEN: tl.constexpr, KGROUP: tl.constexpr,
    STEP: tl.constexpr, RESIDUAL: tl.constexpr, RING: tl.constexpr, ZEROS: tl.constexpr, PIECE: tl.constexpr,
    SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, MATH: tl.constexpr,
    TAIL_MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Attention over one piece of the cache: ``WIDTH`` tiles of codes, or the tail; rows are heads times queries.

    ``state`` int32 [3]: tokens before the ``NEW`` ones, and tokens with codes then. ``scale`` includes log2(e).
    ``part`` [SPLIT + 1, B Q H, DV] float32, ``sums`` [SPLIT + 1, B Q H, 2].
    """
    piece, pair = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    TILE: tl.constexpr = PER * SUB
    tokens = tl.minimum(tl.load(state) + NEW, N)
    coded = tl.maximum(tl.load(state + 1), tl.maximum((tokens - RESIDUAL) // STEP * STEP, 0))
    rows = tl.arange(0, ROWS)
    head, token = g * GROUP + rows // Q, rows % Q
    real = rows < GROUP * Q
    d, dv, first_row = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SUB)
    q = tl.load(
        query + b.to(tl.int64) * q_b + head[None, :] * q_h + token[None, :] * q_n + d[:, None],
        mask=real[None, :] & (d < D)[:, None], other=0.0,
    )  # fmt: skip
    mask += b.to(tl.int64) * m_b
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    acc = tl.zeros((DVP, ROWS), tl.float32)
    total = tl.zeros((SUB, ROWS), tl.float32)
    extra = tl.zeros((SUB, ROWS), tl.float32)
    sink_top = tl.full((ROWS,), float("-inf"), tl.float32)
    pair_at = pair.to(tl.int64)
    if piece < SPLIT:
        wide = q.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=0)
        largest = tl.where(largest == 0.0, 1.0, largest)
        wide = wide / largest[None, :]
        # One operand in shared memory for all tiles. (The query times the scales of each group was wrong on Triton 3.6,
        # whose assembler lost the address when the weights had the same: it read a register that was never written.)
        qs = wide.to(tl.float16) if MATH == FP16 else wide
        row_scale = largest * scale
        first = piece * WIDTH * TILE
        end = tl.minimum(first + WIDTH * TILE, coded)
        last = end
        if HAS_MASK:
            # The positions that any query of the piece may attend to.
            at = first + tl.arange(0, PIECE)
            wanted = tl.zeros((PIECE,), tl.int32)
            for token_at in tl.static_range(Q):
                wanted |= tl.load(mask + token_at * m_n + at, mask=at < end, other=0).to(tl.int32)
            first = tl.min(tl.where(wanted != 0, at, N))
            last = tl.max(tl.where(wanted != 0, at + 1, 0))
        query_sums = tl.zeros((SUB, ROWS), tl.float32)
        if PER_TOKEN:
            if ZEROS:
                query_sums += tl.sum(wide, axis=0)[None, :]
            scales, zeros = key_scale + pair_at * TILES * TILE, key_zero + pair_at * TILES * TILE
        else:
            groups = TILES * (TILE // KGROUP)
            scales, zeros = key_scale + pair_at * groups * DP, key_zero + pair_at * groups * DP
        keys = key_words + pair_at * TILES * SUB * DP + first_row[:, None] * DP + d[None, :]
        values = value_words + pair_at * TILES * SUB * DVP + dv[:, None] * SUB + first_row[None, :]
        v_scales, v_zeros = value_scale + pair_at * TILES * TILE, value_zero + pair_at * TILES * TILE
        for tile in range(first // TILE, (last + TILE - 1) // TILE):
            k = tl.load(keys + tile * SUB * DP)
            v = tl.load(values + tile * SUB * DVP)
            s0 = _sub_scores(k, 0, tile, qs, row_scale, query_sums, scales, zeros, v_scales, mask, d, first_row, end,
                             token, real, softcap, m_n, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, KGROUP, DP, ZEROS,
                             HAS_MASK, HAS_CAP, MATH, ASM)  # fmt: skip
            s1 = _sub_scores(k, 1, tile, qs, row_scale, query_sums, scales, zeros, v_scales, mask, d, first_row, end,
                             token, real, softcap, m_n, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, KGROUP, DP, ZEROS,
                             HAS_MASK, HAS_CAP, MATH, ASM)  # fmt: skip
            highest = tl.maximum(s0, s1)
            if PER == 4:
                s2 = _sub_scores(k, 2, tile, qs, row_scale, query_sums, scales, zeros, v_scales, mask, d, first_row,
                                 end, token, real, softcap, m_n, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, KGROUP, DP,
                                 ZEROS, HAS_MASK, HAS_CAP, MATH, ASM)  # fmt: skip
                s3 = _sub_scores(k, 3, tile, qs, row_scale, query_sums, scales, zeros, v_scales, mask, d, first_row,
                                 end, token, real, softcap, m_n, Q, SUB, PER, BITS, FLOAT8, PER_TOKEN, KGROUP, DP,
                                 ZEROS, HAS_MASK, HAS_CAP, MATH, ASM)  # fmt: skip
                highest = tl.maximum(highest, tl.maximum(s2, s3))
            new_top = tl.maximum(top, tl.max(highest, axis=0))
            # Rows that have seen nothing yet have -inf, of which a difference is NaN.
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
            shrink = tl.exp2(top - base)[None, :]
            acc, total = acc * shrink, total * shrink
            if ZEROS:
                extra *= shrink
            acc, total, extra = _add_values(v, 0, tile, s0, base, acc, total, extra, v_scales, v_zeros, first_row, end,
                                            SUB, PER, BITS, FLOAT8, ZEROS, MATH, ASM)  # fmt: skip
            acc, total, extra = _add_values(v, 1, tile, s1, base, acc, total, extra, v_scales, v_zeros, first_row, end,
                                            SUB, PER, BITS, FLOAT8, ZEROS, MATH, ASM)  # fmt: skip
            if PER == 4:
                acc, total, extra = _add_values(v, 2, tile, s2, base, acc, total, extra, v_scales, v_zeros, first_row,
                                                end, SUB, PER, BITS, FLOAT8, ZEROS, MATH, ASM)  # fmt: skip
                acc, total, extra = _add_values(v, 3, tile, s3, base, acc, total, extra, v_scales, v_zeros, first_row,
                                                end, SUB, PER, BITS, FLOAT8, ZEROS, MATH, ASM)  # fmt: skip
            top = new_top
    else:
        plain = q.to(tl.float32) if TAIL_MATH == FP32 else q
        if HAS_SINKS:
            sink_top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            top = sink_top
        late_keys, late_values = tail_keys + pair_at * RING * D, tail_values + pair_at * RING * DV
        # Not pipelined: the tail is short, and its buffers would take the room of those of the codes.
        for start in tl.range(coded, tokens, SUB, num_stages=1):
            t = start + first_row
            inside = t < tokens
            slot = t % RING
            key = tl.load(
                late_keys + slot[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0
            )
            if TAIL_MATH == FP32:  # noqa: SIM108
                s = tl.dot(key.to(tl.float32), plain, input_precision="ieee")
            else:
                s = tl.dot(key, plain)
            s = _capped(s * scale, softcap, HAS_CAP)
            allowed = _allowed(mask, t, tokens, token, real, m_n, Q, HAS_MASK)
            s = tl.where(allowed, s, NO_SCORE)
            # A value that nobody may see is not multiplied: it may be NaN.
            seen = tl.max(allowed.to(tl.int32), axis=1) != 0
            value = tl.load(
                late_values + slot[None, :] * DV + dv[:, None], mask=seen[None, :] & (dv < DV)[:, None], other=0.0
            )
            tail_top = tl.maximum(top, tl.max(s, axis=0))
            tail_base = tl.where(tail_top == float("-inf"), 0.0, tail_top)
            smaller = tl.exp2(top - tail_base)[None, :]
            p = tl.exp2(s - tail_base[None, :])
            total = total * smaller + p
            if TAIL_MATH == FP32:
                acc = tl.dot(value.to(tl.float32), p, acc * smaller, input_precision="ieee")
            else:
                acc = tl.dot(value, p.to(value.dtype), acc * smaller)
            top = tail_top
    weight = tl.sum(total, axis=0)
    if ZEROS:
        acc += tl.sum(extra, axis=0)[None, :]
    if HAS_SINKS:
        taken = sink_top > float("-inf")
        weight += tl.where(taken, tl.exp2(tl.where(taken, sink_top, 0.0) - tl.where(taken, top, 0.0)), 0.0)
    at = (b * Q + token) * H + head
    where = at[None, :].to(tl.int64) * DV + dv[:, None]
    size = (tl.num_programs(1) // G).to(tl.int64) * Q * H
    tl.store(part + piece * size * DV + where, acc, mask=real[None, :] & (dv < DV)[:, None])
    tl.store(sums + (piece * size + at) * 2, top, mask=real)
    tl.store(sums + (piece * size + at) * 2 + 1, weight, mask=real)


@triton.jit
def _codes(x, low, scale, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr):
    """Return the codes of float32 numbers, as ``naive.quantize``; ``low`` is their least if ZEROS."""
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    if FLOAT8:
        code = float8_code(tl.minimum(tl.maximum(tl.div_rn(x, scale), -448.0), 448.0))
    elif ZEROS:
        code = tl.minimum(tl.maximum(rounded(tl.div_rn(x - low, scale)), 0.0), 2.0 * OFFSET - 1).to(tl.int32)
    else:
        code = tl.minimum(tl.maximum(rounded(tl.div_rn(x, scale)), 1.0 - OFFSET), OFFSET - 1.0).to(tl.int32) + OFFSET
    return code


@triton.jit
def _scale(low, high, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr):
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    if ZEROS:
        span, levels = high - low, 2.0 * OFFSET - 1
    else:
        span = tl.maximum(tl.abs(low), tl.abs(high))
        levels = 448.0 if FLOAT8 else OFFSET - 1.0
    return tl.maximum(tl.div_rn(span, tl.zeros_like(span) + levels), 8.673617379884035e-19)


@triton.jit
def _put(words, codes, place, BITS: tl.constexpr):
    """Set the codes of a place of int16 words."""
    shift = place * BITS
    kept = tl.load(words).to(tl.int32) & ~(((1 << BITS) - 1) << shift)
    tl.store(words, (kept | (codes << shift)).to(tl.int16))


@triton.jit(do_not_specialize=["NEW"])
def _append_kernel(
    key, value, state, key_words, key_scale, key_zero, value_words, value_scale, value_zero, tail_keys, tail_values,
    G, D, DV, TILES, NEW, k_b, k_h, k_n, v_b, v_h, v_n,
    DP: tl.constexpr, DVP: tl.constexpr, SUB: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr,
    FLOAT8: tl.constexpr, PER_TOKEN: tl.constexpr, STEP: tl.constexpr, RESIDUAL: tl.constexpr, RING: tl.constexpr,
    ZEROS: tl.constexpr,
):  # fmt: skip
    """Write ``NEW`` tokens of one row and head into the tail, and quantize the steps that are then due.

    ``state`` int32 [3]: tokens, tokens with codes, and programs that are done: the last one writes the new counts.
    """
    pair = tl.program_id(0)
    b, g = (pair // G).to(tl.int64), pair % G
    pair_at = pair.to(tl.int64)
    TILE: tl.constexpr = PER * SUB
    OFFSET: tl.constexpr = 1 << (BITS - 1)
    tokens, coded = tl.load(state), tl.load(state + 1)
    d, dv, row = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SUB)
    keys, values = tail_keys + pair_at * RING * D, tail_values + pair_at * RING * DV
    k_scales = TILES * TILE if PER_TOKEN else TILES * (TILE // STEP) * DP
    for new in range(NEW):
        slot = (tokens + new) % RING
        tl.store(keys + slot * D + d, tl.load(key + b * k_b + g * k_h + new * k_n + d, mask=d < D, other=0.0),
                 mask=d < D)  # fmt: skip
        tl.store(values + slot * DV + dv, tl.load(value + b * v_b + g * v_h + new * v_n + dv, mask=dv < DV, other=0.0),
                 mask=dv < DV)  # fmt: skip
        if tokens + new + 1 - RESIDUAL >= coded + STEP:
            tl.debug_barrier()  # the step may have tokens that other threads have just written
            low = tl.full((DP,), float("inf"), tl.float32)
            high = tl.full((DP,), float("-inf"), tl.float32)
            for part in tl.static_range(STEP // SUB):
                at = (coded + part * SUB + row) % RING
                x = tl.load(keys + at[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0).to(tl.float32)
                low, high = tl.minimum(low, tl.min(x, axis=0)), tl.maximum(high, tl.max(x, axis=0))
            scale = _scale(low, high, BITS, FLOAT8, ZEROS)
            if not PER_TOKEN:
                where = pair_at * k_scales + (coded // STEP) * DP + d
                tl.store(key_scale + where, scale, mask=d < D)
                if ZEROS:
                    tl.store(key_zero + where, low + OFFSET * scale, mask=d < D)
            for part in tl.static_range(STEP // SUB):
                t = coded + part * SUB + row
                block = coded // SUB + part
                tile, place = block // PER, block % PER
                x = tl.load(keys + (t % RING)[:, None] * D + d[None, :], mask=(d < D)[None, :], other=0.0)
                x = x.to(tl.float32)
                if PER_TOKEN:
                    low_t = tl.min(tl.where((d < D)[None, :], x, float("inf")), axis=1)
                    high_t = tl.max(tl.where((d < D)[None, :], x, float("-inf")), axis=1)
                    scale_t = _scale(low_t, high_t, BITS, FLOAT8, ZEROS)
                    codes = _codes(x, low_t[:, None], scale_t[:, None], BITS, FLOAT8, ZEROS)
                    tl.store(key_scale + pair_at * k_scales + t, scale_t)
                    if ZEROS:
                        tl.store(key_zero + pair_at * k_scales + t, low_t + OFFSET * scale_t)
                else:
                    codes = _codes(x, low[None, :], scale[None, :], BITS, FLOAT8, ZEROS)
                # Channels that pad the words are left at zero.
                at_words = key_words + (pair_at * TILES + tile) * SUB * DP + row[:, None] * DP + d[None, :]
                _put(at_words, tl.where((d < D)[None, :], codes, 0), place, BITS)
                y = tl.load(values + (t % RING)[None, :] * DV + dv[:, None], mask=(dv < DV)[:, None], other=0.0)
                y = y.to(tl.float32)
                low_v = tl.min(tl.where((dv < DV)[:, None], y, float("inf")), axis=0)
                high_v = tl.max(tl.where((dv < DV)[:, None], y, float("-inf")), axis=0)
                scale_v = _scale(low_v, high_v, BITS, FLOAT8, ZEROS)
                codes_v = _codes(y, low_v[None, :], scale_v[None, :], BITS, FLOAT8, ZEROS)
                at_words = value_words + (pair_at * TILES + tile) * SUB * DVP + dv[:, None] * SUB + row[None, :]
                _put(at_words, tl.where((dv < DV)[:, None], codes_v, 0), place, BITS)
                tl.store(value_scale + pair_at * TILES * TILE + t, scale_v)
                if ZEROS:
                    tl.store(value_zero + pair_at * TILES * TILE + t, low_v + OFFSET * scale_v)
                tl.debug_barrier()  # the next sub-block may share its words
            coded += STEP
    # Every program, and every warp of it, has read the state by then.
    tl.debug_barrier()
    if tl.atomic_add(state + 2, 1) == tl.num_programs(0) - 1:
        tl.store(state, tokens + NEW)
        tl.store(state + 1, coded)
        tl.store(state + 2, 0)
