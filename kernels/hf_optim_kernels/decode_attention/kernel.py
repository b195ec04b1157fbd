"""Split-KV attention: each program reads one piece of one key head's cache for the queries of its group.

Where a query may attend is given by ranges of positions, ``[first, end)``, and the pieces divide the range, not the
cache: positions that are not yet written, padding on the left, or outside a window cost nothing, and all programs read
as much. A mask is read only where a range has holes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from ..common.prefetch import fetch_lines

UNIT = tl.constexpr(16)


# A dynamic cache has another length at each token, cut into another number of pieces: neither is compiled for.
@triton.jit(do_not_specialize=["N", "SPLIT"])
def _attend_kernel(
    query, key, value, mask, ranges, sinks, out, part, sums, scale, softcap, SPLIT, H, G, N, D, DV,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_n, r_b,
    GROUP: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, FULL: tl.constexpr, WHOLE: tl.constexpr, HAS_RANGES: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SINKS: tl.constexpr, HAS_CAP: tl.constexpr, MATH: tl.constexpr, EARLY: tl.constexpr, AHEAD: tl.constexpr,
    FETCHED: tl.constexpr,
):  # fmt: skip
    """Attention over one piece of the cache; unless WHOLE, its sums, which ``_combine_kernel`` adds up.

    Programs are (piece, batch row and key head, block of rows), and the rows are the queries of a key head: ``GROUP``
    heads of ``Q`` tokens. ``scale`` includes log2(e). ``ranges`` [B, Q, 3] int32: first and end of the positions, and
    how many of them are allowed. ``part`` [SPLIT, B Q H, DV] float32, ``sums`` [SPLIT, B Q H, 2]: the largest score and
    the sum of powers of 2. FULL: D and DV fill their blocks. EARLY: the next launch may begin meanwhile.
    AHEAD: this one begins while the one before still runs; without ranges it then fetches ``FETCHED`` positions into
    the L2 cache, where what is written meanwhile is seen, too.
    """
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    piece, pair = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    if AHEAD:
        if FETCHED and not HAS_RANGES:
            begin = (N + UNIT - 1) // UNIT * piece // SPLIT * UNIT
            fetch_lines(keys, begin, N, k_n, D, FETCHED, BLOCK_D * key.dtype.element_ty.primitive_bitwidth // 8)
            fetch_lines(values, begin, N, v_n, DV, FETCHED, BLOCK_DV * value.dtype.element_ty.primitive_bitwidth // 8)
        tl.extra.cuda.gdc_wait()
    rows = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    real = rows < GROUP * Q
    head, token = g * GROUP + rows // Q, rows % Q
    low, high = 0, N
    if HAS_RANGES:
        if Q == 1:
            low, high = tl.load(ranges + b * r_b), tl.load(ranges + b * r_b + 1)
            if HAS_MASK:
                has_holes = tl.where(high - low > tl.load(ranges + b * r_b + 2), 1, 0)
        else:
            own = ranges + b * r_b + token * 3
            row_first = tl.load(own, mask=real, other=N)
            row_end = tl.load(own + 1, mask=real, other=0)
            low, high = tl.min(row_first), tl.max(row_end)
            if HAS_MASK:
                length = tl.where(real, row_end - row_first, 0)
                has_holes = tl.max(tl.where(length > tl.load(own + 2, mask=real, other=0), 1, 0))
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    in_d, in_dv = (d < D) | FULL, (dv < DV) | FULL
    q_at = query + b.to(tl.int64) * q_b + head[:, None] * q_h + token[:, None] * q_n + d[None, :]
    q = tl.load(q_at, mask=real[:, None] & in_d[None, :], other=0.0)
    if MATH == FP32:
        q = q.to(tl.float32)
    # Pieces differ by UNIT positions at most: whole blocks would leave some programs a block longer than others.
    units = tl.maximum(high - low + UNIT - 1, 0) // UNIT
    first = low + units * piece // SPLIT * UNIT
    last = tl.minimum(low + units * (piece + 1) // SPLIT * UNIT, high)
    if HAS_MASK:
        mask_end = last * has_holes  # the mask is read up to here
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the piece
        if piece == 0:
            top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    # Within a block offsets are small and the same in each; where the block begins may be beyond 2^31.
    in_block = tl.arange(0, BLOCK_N)
    k_in_block = in_block[None, :] * k_n + d[:, None]
    v_in_block = in_block[:, None] * v_n + dv[None, :]
    for start in range(first, last, BLOCK_N):
        n = start + in_block
        seen = n < last
        k_at = keys + tl.cast(start, tl.int64) * k_n + k_in_block
        k = tl.load(k_at, mask=seen[None, :] & in_d[:, None], other=0.0)
        if MATH == FP32:
            k = k.to(tl.float32)
        s = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            # tanh by exp2; softcap includes log2(e) as scale does.
            bounded = tl.minimum(tl.maximum(s / softcap, -15.0), 15.0)
            e = tl.exp2(bounded * 2.8853900817779268)
            s = softcap * ((e - 1.0) / (e + 1.0))
        if Q == 1:
            if HAS_MASK:
                seen &= tl.load(mask + b * m_b + n, mask=n < mask_end, other=1) != 0
            allowed = seen[None, :] & real[:, None]
        else:
            allowed = seen[None, :] & real[:, None]
            if HAS_RANGES:
                allowed &= (n[None, :] >= row_first[:, None]) & (n[None, :] < row_end[:, None])
            if HAS_MASK:
                m_at = mask + b * m_b + token[:, None] * m_n + n[None, :]
                allowed &= tl.load(m_at, mask=allowed & (n < mask_end)[None, :], other=1) != 0
                seen = tl.max(allowed.to(tl.int32), axis=0) != 0
        s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v_at = values + tl.cast(start, tl.int64) * v_n + v_in_block
        v = tl.load(v_at, mask=seen[:, None] & in_dv[None, :], other=0.0)
        if MATH == FP32:
            v = v.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    # Rows of the output are [b, token, head].
    at = (b * Q + token) * H + head
    where = at[:, None].to(tl.int64) * DV + dv[None, :]
    kept = real[:, None] & in_dv[None, :]
    if WHOLE:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + where, result.to(out.dtype.element_ty), mask=kept)
    else:
        size = (tl.num_programs(1) // G).to(tl.int64) * Q * H
        tl.store(part + piece * size * DV + where, acc, mask=kept)
        tl.store(sums + (piece * size + at) * 2, top, mask=real)
        tl.store(sums + (piece * size + at) * 2 + 1, total, mask=real)


@triton.jit(do_not_specialize=["SPLIT"])
def _combine_kernel(
    part, sums, out, size, SPLIT, DV, SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_DV: tl.constexpr,
    EARLY: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Add up the pieces of a row and ``BLOCK_DV`` channels: out [size, DV]. ``SPLITS`` is a power of two.

    With EARLY it begins while the pieces are being computed, and waits for them; with AHEAD the next launch may begin
    then, too.
    """
    if AHEAD:
        tl.extra.cuda.gdc_launch_dependents()
    if EARLY:
        tl.extra.cuda.gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    pieces = tl.arange(0, SPLITS)
    tops = tl.load(sums + (pieces * size + row) * 2, mask=pieces < SPLIT, other=float("-inf"))
    totals = tl.load(sums + (pieces * size + row) * 2 + 1, mask=pieces < SPLIT, other=0.0)
    top = tl.max(tops)
    base = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(totals * tl.exp2(tops - base))
    acc = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, SPLIT, STEP):
        piece = start + tl.arange(0, STEP)
        own = tl.load(sums + (piece * size + row) * 2, mask=piece < SPLIT, other=float("-inf"))
        weight = tl.exp2(own - base)
        # A piece in which this row sees nothing has stored zeros.
        block = tl.load(
            part + (piece[:, None] * size + row) * DV + dv[None, :], mask=(piece < SPLIT)[:, None] & (dv < DV)[None, :],
            other=0.0,
        )  # fmt: skip
        acc += tl.sum(block * weight[:, None], axis=0)
    result = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * DV + dv, result.to(out.dtype.element_ty), mask=dv < DV)
