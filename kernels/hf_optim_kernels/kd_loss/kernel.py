"""The Triton kernels of the distillation loss; ``naive`` says what they compute.

``_losses_kernel``: a program goes once over its row of both logits, and keeps for each the largest logit and the sum of
exponentials relative to it, rescaled when a larger one comes (online logsumexp). Forward and reverse need no second
look: their expectation is summed on the way. The mixture of ``js`` needs both normalizers first, and takes a second
pass. ``_gradient_kernel`` makes a piece of a row of the gradient from the logits and the kept statistics. Neither a
softmax nor anything else of the size of the logits is written but the gradient.

Logarithms are to the base 2 inside: ``SCALE`` is ``log2(e) / T``, and LN2 brings a result back.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FORWARD, REVERSE, JS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Stands for -inf, so that no difference of two is NaN, and a divergence beyond INFINITE for an infinite one.
LOWEST, FAR, INFINITE = tl.constexpr(-1.0e30), tl.constexpr(1.0e4), tl.constexpr(1.0e20)


@triton.jit
def _row(logits, columns, limit, scale):
    """The logits of some columns over T, in units of log2; LOWEST where they are -inf, and past ``limit``."""
    z = tl.load(logits + columns, columns < limit, -float("inf")).to(tl.float32) * scale
    return tl.where(z < LOWEST, LOWEST, z)  # NaN stays


@triton.jit
def _weighted(weight, difference):
    """``weight * difference``, 0 where the weight is."""
    return tl.where(weight > 0.0, weight * difference, 0.0)


@triton.jit
def _log2(x):
    """The logarithm, and 0 of 0."""
    return tl.log2(tl.where(x == 0.0, 1.0, x))


@triton.jit
def _losses_kernel(
    student, teacher, kept, losses, statistics, V, stride_s, stride_t, scale, factor, beta,
    DIRECTION: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """losses [rows] = factor * D; statistics [rows, 3] = the logsumexp of both, and what the gradient needs else."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    limit = V
    if HAS_KEPT:
        limit = tl.where(tl.load(kept + row) != 0, V, 0)
    columns = tl.arange(0, BLOCK)
    most_s = tl.full([], LOWEST, tl.float32)
    most_t = tl.full([], LOWEST, tl.float32)
    offset = tl.zeros([], tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        z_s, z_t = _row(student, start + columns, limit, scale), _row(teacher, start + columns, limit, scale)
        top_s, top_t = tl.maximum(most_s, tl.max(z_s, 0)), tl.maximum(most_t, tl.max(z_t, 0))
        down_s, down_t = tl.exp2(most_s - top_s), tl.exp2(most_t - top_t)
        q, p = tl.exp2(z_s - top_s), tl.exp2(z_t - top_t)
        sum_s, sum_t = sum_s * down_s + q, sum_t * down_t + p
        if start == 0:
            # What the logits of the first step differ by on the whole; it is taken out of the expectation, whose
            # rounding is then that of what is left.
            offset = tl.where(tl.abs(top_t - top_s) < FAR, top_t - top_s, 0.0)
        if DIRECTION == FORWARD:
            expected = expected * down_t + _weighted(p, z_t - z_s - offset)
        if DIRECTION == REVERSE:
            expected = expected * down_s + _weighted(q, z_s - z_t + offset)
        most_s, most_t = top_s, top_t
    total_s, total_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    lse_s, lse_t = most_s + _log2(total_s), most_t + _log2(total_t)
    loss = tl.sum(expected, 0)
    kept_back = loss
    if DIRECTION == FORWARD:
        loss = loss / tl.where(total_t == 0.0, 1.0, total_t) - ((lse_t - lse_s) - offset)
    if DIRECTION == REVERSE:
        loss = loss / tl.where(total_s == 0.0, 1.0, total_s) + ((lse_t - lse_s) - offset)
    if DIRECTION != JS:
        loss = tl.where(loss > INFINITE, float("inf"), loss)
        kept_back = loss
    if DIRECTION == JS:
        of_p = tl.zeros([BLOCK], tl.float32)
        of_q = tl.zeros([BLOCK], tl.float32)
        for start in range(0, limit, BLOCK):
            log_q = _row(student, start + columns, limit, scale) - lse_s
            log_p = _row(teacher, start + columns, limit, scale) - lse_t
            q, p = tl.exp2(log_q), tl.exp2(log_p)
            m = beta * p + (1.0 - beta) * q
            log_m = _log2(m)
            of_p += _weighted(tl.where(m > 0.0, p, 0.0), log_p - log_m)
            of_q += _weighted(tl.where(m > 0.0, q, 0.0), log_q - log_m)
        kept_back = tl.sum(of_q, 0)
        loss = beta * tl.sum(of_p, 0) + (1.0 - beta) * kept_back
    there = limit > 0
    tl.store(losses + row, tl.where(there, loss * (LN2 * factor), 0.0))
    tl.store(statistics + row * 3, tl.where(there, lse_s, 0.0))
    tl.store(statistics + row * 3 + 1, tl.where(there, lse_t, 0.0))
    tl.store(statistics + row * 3 + 2, tl.where(there, kept_back, 0.0))


@triton.jit
def _gradient_kernel(
    student, teacher, kept, statistics, upstream, out, V, stride_s, stride_t, stride_o, scale, factor, beta,
    DIRECTION: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out [rows, V] = factor * upstream * dD/du, 0 in rows that are not kept. ``out`` may be ``teacher`` itself."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    limit = V
    if HAS_KEPT:
        limit = tl.where(tl.load(kept + row) != 0, V, 0)
    lse_s, lse_t = tl.load(statistics + row * 3), tl.load(statistics + row * 3 + 1)
    log_q = _row(student + row * stride_s, columns, limit, scale) - lse_s
    log_p = _row(teacher + row * stride_t, columns, limit, scale) - lse_t
    q, p = tl.exp2(log_q), tl.exp2(log_p)
    slope = q - p
    if DIRECTION != FORWARD:
        known = tl.load(statistics + row * 3 + 2)
        if DIRECTION == REVERSE:
            slope = _weighted(q, log_q - log_p - known) * LN2
        else:
            m = beta * p + (1.0 - beta) * q
            slope = _weighted(tl.where(m > 0.0, q, 0.0), log_q - _log2(m) - known) * (LN2 * (1.0 - beta))
    slope *= factor * tl.load(upstream + row).to(tl.float32)
    tl.store(out + row * stride_o + columns, slope.to(out.dtype.element_ty), columns < V)
