"""A step of one token: its key and value go into the state, which is updated in place, and its queries read it."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import cosine, finite, rest_of, sine


@triton.jit
def _step_kernel(
    query, key, value, weight, gates, amounts, state, sums, references, out, root, half, eps, share, floor, H, P, G, D,
    DV, m, w_h, q_b, q_h, k_b, k_h, v_b, v_h,
    ROWS: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_AMOUNTS: tl.constexpr,
):  # fmt: skip
    """Programs are (batch row and state head); ROWS is a power of two that its query heads fit in. ``state`` [B P, F,
    DV], ``sums`` [B P, F], ``references`` [B P] float32, natural logarithms; so are exponents, and angles are in turns.
    ``out`` [B, H, DV].
    """
    pair = tl.program_id(0)
    b, p = pair // P, pair % P
    g, group = p // (P // G), H // P
    d, dv, r = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, ROWS)
    real, h = r < group, p * group + r
    y = tl.load(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h + d, mask=d < D, other=0.0).to(tl.float32)
    v = tl.load(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h + dv, mask=dv < DV, other=0.0).to(tl.float32)
    at = query + b.to(tl.int64) * q_b + h.to(tl.int64)[:, None] * q_h + d[None, :]
    x = tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    if NORMED:
        y = y / (tl.sqrt(tl.sum(y * y)) + eps)
        x = x / (tl.sqrt(tl.sum(x * x, axis=1)) + eps)[:, None]
    norm = half * tl.sum(y * y)
    weights = weight + p * w_h
    own, F = pair.to(tl.int64), m
    if TRIG:
        F = 2 * m
    top_k, top_q = 0.0, tl.zeros((ROWS,), tl.float32)
    if not TRIG:
        top_k, top_q = -float("inf"), top_q - float("inf")
        for start in range(0, m, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            w = _rows(weights, f, d, m, D)
            top_k = tl.maximum(top_k, tl.max(tl.where(f < m, tl.sum(w * y[None, :], axis=1), -float("inf"))))
            a = tl.sum(x[:, None, :] * w[None, :, :], axis=2)
            top_q = tl.maximum(top_q, tl.max(tl.where((f < m)[None, :], a, -float("inf")), axis=1))
    log, decay = 0.0, 0.0
    if not TRIG:
        log = top_k * root - norm
    if HAS_GATE:
        decay = tl.load(gates + own).to(tl.float32)
        log += tl.log(rest_of(decay))
    reference = 0.0
    if TRIG:
        shrink, count = tl.exp(decay), tl.exp(log)
    else:
        past = tl.load(references + own) + decay
        reference = tl.maximum(past, log)
        base = finite(reference)
        shrink, count = tl.exp(past - base), tl.exp(log - base)
    acc = tl.zeros((ROWS, BLOCK_DV), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for start in range(0, m, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        w = _rows(weights, f, d, m, D)
        a_k = tl.sum(w * y[None, :], axis=1) * root
        a_q = tl.sum(x[:, None, :] * w[None, :, :], axis=2) * root
        row = own * F + f
        if TRIG:
            new, new_sums = _update(state, sums, row, f < m, dv, DV, sine(a_k) * share * count, v, shrink)
            q = tl.where((f < m)[None, :], sine(a_q) * share, 0.0)
            acc += tl.sum(q[:, :, None] * new[None, :, :], axis=1)
            total += tl.sum(q * new_sums[None, :], axis=1)
            new, new_sums = _update(state, sums, row + m, f < m, dv, DV, cosine(a_k) * share * count, v, shrink)
            q = tl.where((f < m)[None, :], cosine(a_q) * share, 0.0)
        else:
            phi = tl.where(f < m, tl.exp(a_k - top_k * root) * count, 0.0)
            new, new_sums = _update(state, sums, row, f < m, dv, DV, phi, v, shrink)
            q = tl.where((f < m)[None, :], tl.exp(a_q - top_q[:, None] * root), 0.0)
        acc += tl.sum(q[:, :, None] * new[None, :, :], axis=1)
        total += tl.sum(q * new_sums[None, :], axis=1)
    if not TRIG:
        tl.store(references + own, reference)
    if HAS_AMOUNTS:
        floor *= tl.load(amounts + own)
    free = total > floor
    if TRIG:
        acc = acc / tl.where(free, total, floor)[:, None]
    else:
        acc = tl.where(free[:, None], acc / tl.where(free, total, 1.0)[:, None], 0.0)
    where = out + (b.to(tl.int64) * H + h)[:, None] * DV + dv[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=real[:, None] & (dv < DV)[None, :])


@triton.jit
def _rows(weights, f, d, m, D):
    at = weights + f[:, None] * D + d[None, :]
    return tl.load(at, mask=(f < m)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _update(state, sums, row, real, dv, DV, phi, v, shrink):
    """Add a key's features and value to rows of the state; return the rows."""
    at, kept = state + row[:, None] * DV + dv[None, :], real[:, None] & (dv < DV)[None, :]
    new = tl.load(at, mask=kept, other=0.0) * shrink + phi[:, None] * v[None, :]
    new_sums = tl.load(sums + row, mask=real, other=0.0) * shrink + phi
    tl.store(at, new, mask=kept)
    tl.store(sums + row, new_sums, mask=real)
    return new, new_sums
