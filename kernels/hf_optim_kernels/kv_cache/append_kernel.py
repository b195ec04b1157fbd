"""The Triton kernel that writes tokens into a quantized cache (specified by ``naive.append``)."""

from __future__ import annotations

import triton
import triton.language as tl

from .numbers import float8_code, rounded


@triton.jit
def _codes(x, low, scale, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr):
    """Return the codes of float32 numbers, as ``naive.quantize``; ``low`` is their least if ZEROS."""
    HALF: tl.constexpr = 1 << (BITS - 1)
    if FLOAT8:
        code = float8_code(tl.minimum(tl.maximum(tl.div_rn(x, scale), -448.0), 448.0))
    elif ZEROS:
        code = tl.minimum(tl.maximum(rounded(tl.div_rn(x - low, scale)), 0.0), 2.0 * HALF - 1).to(tl.int32)
    else:
        code = tl.minimum(tl.maximum(rounded(tl.div_rn(x, scale)), 1.0 - HALF), HALF - 1.0).to(tl.int32) + HALF
    return code


@triton.jit
def _scale(low, high, BITS: tl.constexpr, FLOAT8: tl.constexpr, ZEROS: tl.constexpr):
    HALF: tl.constexpr = 1 << (BITS - 1)
    if ZEROS:
        span, levels = high - low, 2.0 * HALF - 1
    else:
        span = tl.maximum(tl.abs(low), tl.abs(high))
        levels = 448.0 if FLOAT8 else HALF - 1.0
    return tl.maximum(tl.div_rn(span, tl.zeros_like(span) + levels), 8.673617379884035e-19)


@triton.jit
def _put(words, new, place, RUN: tl.constexpr, PER: tl.constexpr, BITS: tl.constexpr):
    """Set the codes of ``RUN`` places of int16 words from ``place`` on; ``new`` has them at these places."""
    if RUN < PER:
        new |= tl.load(words).to(tl.int32) & ~(((1 << (RUN * BITS)) - 1) << (place * BITS))
    tl.store(words, new.to(tl.int16))


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
    OFFSET: tl.constexpr = 0 if BITS == 4 and ZEROS else 1 << (BITS - 1)
    # Places of a word that a step fills.
    RUN: tl.constexpr = PER if STEP >= TILE else STEP // SUB
    tokens, coded = tl.load(state), tl.load(state + 1)
    d, dv, row = tl.arange(0, DP), tl.arange(0, DVP), tl.arange(0, SUB)
    keys, values = tail_keys + pair_at * RING * D, tail_values + pair_at * RING * DV
    k_scales = TILES * TILE if PER_TOKEN else TILES * TILE // STEP * DP
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
            for part in tl.static_range(STEP // (SUB * RUN)):
                block = coded // SUB + part * RUN
                tile, place = block // PER, block % PER
                key_codes = tl.zeros((SUB, DP), tl.int32)
                value_codes = tl.zeros((DVP, SUB), tl.int32)
                for more in tl.static_range(RUN):
                    t = (block + more) * SUB + row
                    shift = (place + more) * BITS
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
                    key_codes |= tl.where((d < D)[None, :], codes, 0) << shift
                    y = tl.load(values + (t % RING)[None, :] * DV + dv[:, None], mask=(dv < DV)[:, None], other=0.0)
                    y = y.to(tl.float32)
                    low_v = tl.min(tl.where((dv < DV)[:, None], y, float("inf")), axis=0)
                    high_v = tl.max(tl.where((dv < DV)[:, None], y, float("-inf")), axis=0)
                    scale_v = _scale(low_v, high_v, BITS, FLOAT8, ZEROS)
                    codes_v = _codes(y, low_v[None, :], scale_v[None, :], BITS, FLOAT8, ZEROS)
                    value_codes |= tl.where((dv < DV)[:, None], codes_v, 0) << shift
                    tl.store(value_scale + pair_at * TILES * TILE + t, scale_v)
                    if ZEROS:
                        tl.store(value_zero + pair_at * TILES * TILE + t, low_v + OFFSET * scale_v)
                at_words = key_words + (pair_at * TILES + tile) * SUB * DP + row[:, None] * DP + d[None, :]
                _put(at_words, key_codes, place, RUN, PER, BITS)
                at_words = value_words + (pair_at * TILES + tile) * SUB * DVP + dv[:, None] * SUB + row[None, :]
                _put(at_words, value_codes, place, RUN, PER, BITS)
            if RUN < PER:
                tl.debug_barrier()  # the next step may share these words
            coded += STEP
    # Every program, and every warp of it, has read the state by then.
    tl.debug_barrier()
    if tl.atomic_add(state + 2, 1) == tl.num_programs(0) - 1:
        tl.store(state, tokens + NEW)
        tl.store(state + 1, coded)
        tl.store(state + 2, 0)
