"""A program attends from a block of places of one chunk to the chunks in its reach, or gathers gradients of a block."""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from ..sparse_attention.parts import load_rows

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _place(places, pair, chunk, chunks, width, block, inside, SIZE: tl.constexpr):
    """Return the places of a block of a chunk, the tokens there, and which places have one."""
    at = block * SIZE + inside
    own = chunk + 0 * inside
    place = pair.to(tl.int64) * chunks * width + chunk * width + at
    token = tl.load(places + place, mask=(at < width) & (own >= 0) & (own < chunks), other=-1)
    return chunk * width + at, token, token >= 0


@triton.jit
def _row_of(place, token, GATHERED: tl.constexpr):
    if GATHERED:  # noqa: SIM108 - one of the two is compiled
        found = place
    else:
        found = token
    return tl.maximum(found, 0).to(tl.int64)


@triton.jit
def _next(chunk, chunks, WRAP: tl.constexpr):
    """Return the number of a chunk that may lie before the first or after the last."""
    if WRAP:
        chunk = (chunk + chunks) % chunks
    return chunk


@triton.jit
def _scored(s, one, other, real, ALONE, CAUSAL: tl.constexpr, NO_SELF: tl.constexpr):
    """Return scores of queries ``one`` and keys ``other`` (tokens that broadcast), -inf where nothing is seen."""
    seen = real
    if CAUSAL:
        seen = seen & (other <= one)
    if NO_SELF:
        s = tl.where(one == other, s - ALONE, s)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _forward_kernel(
    query, key, value, places_q, places_k, out, lse, scale, ALONE, H, G, N, D, DV, chunks, width_q, width_k, before,
    reach, blocks_q, blocks_k, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, o_b, o_h, o_n,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, WRAP: tl.constexpr, CAUSAL: tl.constexpr, NO_SELF: tl.constexpr, GATHERED: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Programs are (block of a chunk, batch row and head); ``scale`` and ALONE include log2(e). ``reach`` chunks from
    ``before`` before the own one are read, in ``blocks_k`` blocks of STEP places each.
    """
    WIDE: tl.constexpr = MATH == FP32
    unit, pair = tl.program_id(0) % (chunks * blocks_q), tl.program_id(0) // (chunks * blocks_q)
    b, h, chunk = pair // H, pair % H, unit // blocks_q
    g = h // (H // G)
    row, inside, d, dv = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place, token, real = _place(places_q, pair, chunk, chunks, width_q, unit % blocks_q, row, ROWS)
    at = _row_of(place, token, GATHERED)
    base = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    q = load_rows(base + at[:, None] * q_n + d[None, :], real, d, D, True, FULL_D, WIDE)
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    for step in range(0, reach * blocks_k):
        other = _next(chunk - before + step // blocks_k, chunks, WRAP)
        place_k, token_k, real_k = _place(places_k, pair, other, chunks, width_k, step % blocks_k, inside, STEP)
        at_k = _row_of(place_k, token_k, GATHERED)
        k = load_rows(keys + at_k[:, None] * k_n + d[None, :], real_k, d, D, True, FULL_D, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _scored(s, token[:, None], token_k[None, :], real[:, None] & real_k[None, :], ALONE, CAUSAL, NO_SELF)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        # Rows that have seen nothing yet have -inf, of which a difference is NaN.
        low = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.exp2(s - low[:, None])
        shrink = tl.exp2(top - low)
        total = total * shrink + tl.sum(p, axis=1)
        v = load_rows(values + at_k[:, None] * v_n + dv[None, :], real_k, dv, DV, True, FULL_DV, WIDE)
        acc = acc * shrink[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new_top
    some = total > 0.0
    result = acc / tl.where(some, total, 1.0)[:, None]
    logs = tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf"))
    kept = real
    if GATHERED:
        kept = (unit % blocks_q) * ROWS + row < width_q
    o_at = out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h + at[:, None] * o_n + dv[None, :]
    tl.store(o_at, result.to(out.dtype.element_ty), mask=kept[:, None] & (dv < DV)[None, :])
    tl.store(lse + pair.to(tl.int64) * N + at, logs, mask=kept)


@triton.jit
def _weights_of(s, logs, seen, ALONE):
    """Return the weights of scores [.., ..] for the log-sums of their queries.

    Those of a token that sees itself alone are lowered by so much that only one over the number of its places is left
    of their digits: the same for each, as the places of a token have one key.
    """
    low = tl.where(logs == float("-inf"), 0.0, logs)
    # A query does not see a score above its log-sum: this keeps what a mask has removed from overflowing.
    p = tl.exp2(tl.minimum(s - low, 0.0))
    lone = (logs < -ALONE / 2) & seen
    places = tl.floor(1.0 / tl.where(lone, p, 1.0) + 0.5)
    return tl.where(lone, 1.0 / places, p)


@triton.jit
def _query_kernel(
    query, key, value, places_q, places_k, lse, delta, grad_out, grad_query, scale, ALONE, H, G, N, D, DV, chunks,
    width_q, width_k, before, reach, blocks_q, blocks_k, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h, g_n,
    x_b, x_h, x_n,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, WRAP: tl.constexpr, CAUSAL: tl.constexpr, NO_SELF: tl.constexpr, GATHERED: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of queries; programs and arguments as of ``_forward_kernel``."""
    WIDE: tl.constexpr = MATH == FP32
    unit, pair = tl.program_id(0) % (chunks * blocks_q), tl.program_id(0) // (chunks * blocks_q)
    b, h, chunk = pair // H, pair % H, unit // blocks_q
    g = h // (H // G)
    row, inside, d, dv = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place, token, real = _place(places_q, pair, chunk, chunks, width_q, unit % blocks_q, row, ROWS)
    at = _row_of(place, token, GATHERED)
    base = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    q = load_rows(base + at[:, None] * q_n + d[None, :], real, d, D, True, FULL_D, WIDE)
    base = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    slope = load_rows(base + at[:, None] * g_n + dv[None, :], real, dv, DV, True, FULL_DV, WIDE)
    logs = tl.load(lse + pair.to(tl.int64) * N + at, mask=real, other=0.0) * LOG2E
    less = tl.load(delta + pair.to(tl.int64) * N + at, mask=real, other=0.0)
    keys = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    values = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    acc = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for step in range(0, reach * blocks_k):
        other = _next(chunk - before + step // blocks_k, chunks, WRAP)
        place_k, token_k, real_k = _place(places_k, pair, other, chunks, width_k, step % blocks_k, inside, STEP)
        at_k = _row_of(place_k, token_k, GATHERED)
        k = load_rows(keys + at_k[:, None] * k_n + d[None, :], real_k, d, D, True, FULL_D, WIDE)
        v = load_rows(values + at_k[:, None] * v_n + dv[None, :], real_k, dv, DV, True, FULL_DV, WIDE)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        s = _scored(s, token[:, None], token_k[None, :], real[:, None] & real_k[None, :], ALONE, CAUSAL, NO_SELF)
        p = _weights_of(s, logs[:, None], s > float("-inf"), ALONE)
        inner = p * (tl.dot(slope, tl.trans(v), input_precision="ieee") - less[:, None])
        acc += tl.dot(inner.to(k.dtype), k, input_precision="ieee")
    kept = real
    if GATHERED:
        kept = (unit % blocks_q) * ROWS + row < width_q
    x_at = grad_query + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + at[:, None] * x_n + d[None, :]
    tl.store(x_at, (acc * (scale * LN2)).to(grad_query.dtype.element_ty), mask=kept[:, None] & (d < D)[None, :])


@triton.jit
def _key_kernel(
    query, key, value, places_q, places_k, lse, delta, grad_out, grad_key, grad_value, scale, ALONE, H, G, N, D, DV,
    chunks, width_q, width_k, after, reach, blocks_q, blocks_k, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, g_b, g_h,
    g_n, x_b, x_h, x_n, y_b, y_h, y_n,
    ROWS: tl.constexpr, STEP: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, FULL_D: tl.constexpr,
    FULL_DV: tl.constexpr, WRAP: tl.constexpr, CAUSAL: tl.constexpr, NO_SELF: tl.constexpr, GATHERED: tl.constexpr,
    MATH: tl.constexpr,
):  # fmt: skip
    """Gradients of a block of STEP keys and values by query head: chunks from ``after`` before the own one have the
    queries that see it. Rows of tiles are keys.
    """
    WIDE: tl.constexpr = MATH == FP32
    unit, pair = tl.program_id(0) % (chunks * blocks_k), tl.program_id(0) // (chunks * blocks_k)
    b, h, chunk = pair // H, pair % H, unit // blocks_k
    g = h // (H // G)
    row, inside, d, dv = tl.arange(0, ROWS), tl.arange(0, STEP), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    place, token, real = _place(places_k, pair, chunk, chunks, width_k, unit % blocks_k, inside, STEP)
    at = _row_of(place, token, GATHERED)
    base = key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h
    k = load_rows(base + at[:, None] * k_n + d[None, :], real, d, D, True, FULL_D, WIDE)
    base = value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h
    v = load_rows(base + at[:, None] * v_n + dv[None, :], real, dv, DV, True, FULL_DV, WIDE)
    queries = query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h
    slopes = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
    acc = tl.zeros((STEP, BLOCK_D), tl.float32)
    acc_v = tl.zeros((STEP, BLOCK_DV), tl.float32)
    for step in range(0, reach * blocks_q):
        other = _next(chunk - after + step // blocks_q, chunks, WRAP)
        place_q, token_q, real_q = _place(places_q, pair, other, chunks, width_q, step % blocks_q, row, ROWS)
        at_q = _row_of(place_q, token_q, GATHERED)
        q = load_rows(queries + at_q[:, None] * q_n + d[None, :], real_q, d, D, True, FULL_D, WIDE)
        slope = load_rows(slopes + at_q[:, None] * g_n + dv[None, :], real_q, dv, DV, True, FULL_DV, WIDE)
        logs = tl.load(lse + pair.to(tl.int64) * N + at_q, mask=real_q, other=0.0) * LOG2E
        less = tl.load(delta + pair.to(tl.int64) * N + at_q, mask=real_q, other=0.0)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale
        s = _scored(s, token_q[None, :], token[:, None], real[:, None] & real_q[None, :], ALONE, CAUSAL, NO_SELF)
        p = _weights_of(s, logs[None, :], s > float("-inf"), ALONE)
        acc_v += tl.dot(p.to(slope.dtype), slope, input_precision="ieee")
        inner = p * (tl.dot(v, tl.trans(slope), input_precision="ieee") - less[None, :])
        acc += tl.dot(inner.to(q.dtype), q, input_precision="ieee")
    kept = real
    if GATHERED:
        kept = (unit % blocks_k) * STEP + inside < width_k
    x_at = grad_key + b.to(tl.int64) * x_b + h.to(tl.int64) * x_h + at[:, None] * x_n + d[None, :]
    tl.store(x_at, (acc * (scale * LN2)).to(grad_key.dtype.element_ty), mask=kept[:, None] & (d < D)[None, :])
    y_at = grad_value + b.to(tl.int64) * y_b + h.to(tl.int64) * y_h + at[:, None] * y_n + dv[None, :]
    tl.store(y_at, acc_v.to(grad_value.dtype.element_ty), mask=kept[:, None] & (dv < DV)[None, :])
