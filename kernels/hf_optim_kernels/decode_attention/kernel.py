"""Split-KV attention: each program reads one piece of one key head's cache for all queries of its group.

The pieces are as long as the mask is read at once, so that a program knows the first and the last position it needs
before it reads a key: pieces that are masked (not yet written, padding, outside the window) cost nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32


@triton.jit
def _attend_kernel(
    query, key, value, mask, sinks, out, part, sums, scale, softcap, H, G, N, D, DV, WIDTH,
    q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, m_b, m_n,
    GROUP: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_N: tl.constexpr, PIECE: tl.constexpr, SPLIT: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_CAP: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Attention over one piece of the cache; with SPLIT > 1 its sums, which ``_combine_kernel`` adds up.

    Rows of a program are the queries of a key head: ``GROUP`` heads of ``Q`` tokens. ``scale`` includes log2(e).
    ``part`` [SPLIT, B Q H, DV] float32, ``sums`` [SPLIT, B Q H, 2]: the largest score and the sum of powers of 2.
    """
    piece, pair = tl.program_id(0), tl.program_id(1)
    b, g = pair // G, pair % G
    rows = tl.arange(0, ROWS)
    head, token = g * GROUP + rows // Q, rows % Q
    real = rows < GROUP * Q
    d, dv = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = tl.load(
        query + b.to(tl.int64) * q_b + head[:, None] * q_h + token[:, None] * q_n + d[None, :],
        mask=real[:, None] & (d < D)[None, :], other=0.0,
    )  # fmt: skip
    if MATH == FP32:
        q = q.to(tl.float32)
    first = piece * WIDTH
    last = tl.minimum(first + WIDTH, N)
    if HAS_MASK:
        # The positions that any query of the piece may attend to.
        at = first + tl.arange(0, PIECE)
        wanted = tl.zeros((PIECE,), tl.int32)
        for token_at in tl.static_range(Q):
            wanted |= tl.load(mask + b * m_b + token_at * m_n + at, mask=at < last, other=0).to(tl.int32)
        low = tl.min(tl.where(wanted != 0, at, N))
        last = tl.max(tl.where(wanted != 0, at + 1, 0))
        first = (low // BLOCK_N) * BLOCK_N
        first = tl.maximum(first, piece * WIDTH)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    if HAS_SINKS:  # noqa: SIM102 - known when the kernel is compiled, unlike the piece
        if piece == 0:
            top = tl.load(sinks + head, mask=real, other=0.0).to(tl.float32) * 1.4426950408889634
            total = tl.full((ROWS,), 1.0, tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    keys = key + b.to(tl.int64) * k_b + g * k_h
    values = value + b.to(tl.int64) * v_b + g * v_h
    for start in range(first, last, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        inside = n < last
        k = tl.load(
            keys + n[None, :].to(tl.int64) * k_n + d[:, None], mask=inside[None, :] & (d < D)[:, None], other=0.0
        )
        if MATH == FP32:
            k = k.to(tl.float32)
        s = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_CAP:
            # tanh by exp2; softcap includes log2(e) as scale does.
            bounded = tl.minimum(tl.maximum(s / softcap, -15.0), 15.0)
            e = tl.exp2(bounded * 2.8853900817779268)
            s = softcap * ((e - 1.0) / (e + 1.0))
        seen = inside
        allowed = inside[None, :] & real[:, None]
        if HAS_MASK:
            if Q == 1:
                seen = tl.load(mask + b * m_b + n, mask=inside, other=0) != 0
                allowed = seen[None, :] & real[:, None]
            else:
                allowed &= tl.load(mask + b * m_b + token[:, None] * m_n + n[None, :], mask=allowed, other=0) != 0
                seen = tl.max(allowed.to(tl.int32), axis=0) != 0
        s = tl.where(allowed, s, float("-inf"))
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(
            values + n[:, None].to(tl.int64) * v_n + dv[None, :], mask=seen[:, None] & (dv < DV)[None, :], other=0.0
        )
        if MATH == FP32:
            v = v.to(tl.float32)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    # Rows of the output are [b, token, head].
    at = (b * Q + token) * H + head
    where = at[:, None].to(tl.int64) * DV + dv[None, :]
    kept = real[:, None] & (dv < DV)[None, :]
    if SPLIT == 1:
        result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
        tl.store(out + where, result.to(out.dtype.element_ty), mask=kept)
    else:
        size = (tl.num_programs(1) // G).to(tl.int64) * Q * H
        tl.store(part + piece * size * DV + where, acc, mask=kept)
        tl.store(sums + (piece * size + at) * 2, top, mask=real)
        tl.store(sums + (piece * size + at) * 2 + 1, total, mask=real)


@triton.jit
def _combine_kernel(
    part, sums, out, size, DV, SPLIT: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr, BLOCK_DV: tl.constexpr
):
    """Add up the pieces of one row: out [size, DV]. ``SPLITS`` is the power of two from ``SPLIT`` on."""
    row = tl.program_id(0).to(tl.int64)
    dv = tl.arange(0, BLOCK_DV)
    pieces = tl.arange(0, SPLITS)
    tops = tl.load(sums + (pieces * size + row) * 2, mask=pieces < SPLIT, other=float("-inf"))
    top = tl.max(tops)
    base = tl.where(top == float("-inf"), 0.0, top)
    totals = tl.load(sums + (pieces * size + row) * 2 + 1, mask=pieces < SPLIT, other=0.0)
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
