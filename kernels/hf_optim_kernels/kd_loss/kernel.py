"""The Triton kernels of the distillation loss (specified by ``naive``).

``_losses_kernel``: a program reads its row of both logits once, and keeps for each the largest logit and the sum of
exponentials relative to it, rescaled when a larger one appears (online logsumexp). Forward and reverse need no second
pass: their expectation is summed on the way. The mixture of ``js`` needs both normalizers first, and takes a second
pass. ``_gradient_kernel`` computes a piece of a row of the gradient from the logits and the stored statistics. The
gradient is the only tensor of the size of the logits that is written; no softmax is.

Logarithms are to the base 2 internally: ``SCALE`` is ``log2(e) / T``, and LN2 converts a result back.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
FORWARD, REVERSE, JS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# LOWEST replaces -inf, so that no difference of two is NaN; a divergence beyond INFINITE is infinite.
LOWEST, FAR, INFINITE = tl.constexpr(-1.0e30), tl.constexpr(1.0e4), tl.constexpr(1.0e20)


@triton.jit
def _row(logits, columns, limit, scale):
    """Return the logits of some columns over T, in units of log2; LOWEST where they are -inf, and past ``limit``."""
    z = tl.load(logits + columns, columns < limit, -float("inf")).to(tl.float32) * scale
    return tl.where(z < LOWEST, LOWEST, z)  # NaN stays


@triton.jit
def _weighted(weight, difference):
    """Return ``weight * difference``; 0 where the weight is 0."""
    return tl.where(weight > 0.0, weight * difference, 0.0)


@triton.jit
def _log2(x):
    """Return the logarithm to the base 2; 0 for 0."""
    return tl.log2(tl.where(x == 0.0, 1.0, x))


@triton.jit
def _losses_kernel(
    student, teacher, kept, losses, statistics, V, stride_s, stride_t, scale, factor, beta,
    DIRECTION: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write losses [rows] = factor * D, and statistics [rows, 3]: both logsumexps, and a number for the gradient."""
    row = tl.program_id(0).to(tl.int64)
    student += row * stride_s
    teacher += row * stride_t
    limit = V
    if HAS_KEPT:
        limit = tl.where(tl.load(kept + row) != 0, V, 0)
    columns = tl.arange(0, BLOCK)
    max_s = tl.full([], LOWEST, tl.float32)
    max_t = tl.full([], LOWEST, tl.float32)
    offset = tl.zeros([], tl.float32)
    sum_s = tl.zeros([BLOCK], tl.float32)
    sum_t = tl.zeros([BLOCK], tl.float32)
    expected = tl.zeros([BLOCK], tl.float32)
    for start in range(0, limit, BLOCK):
        z_s, z_t = _row(student, start + columns, limit, scale), _row(teacher, start + columns, limit, scale)
        new_max_s, new_max_t = tl.maximum(max_s, tl.max(z_s, 0)), tl.maximum(max_t, tl.max(z_t, 0))
        rescale_s, rescale_t = tl.exp2(max_s - new_max_s), tl.exp2(max_t - new_max_t)
        q, p = tl.exp2(z_s - new_max_s), tl.exp2(z_t - new_max_t)
        sum_s, sum_t = sum_s * rescale_s + q, sum_t * rescale_t + p
        if start == 0:
            # The overall difference of the logits in the first step is taken out of the expectation, which then only
            # rounds the remainder.
            offset = tl.where(tl.abs(new_max_t - new_max_s) < FAR, new_max_t - new_max_s, 0.0)
        if DIRECTION == FORWARD:
            expected = expected * rescale_t + _weighted(p, z_t - z_s - offset)
        if DIRECTION == REVERSE:
            expected = expected * rescale_s + _weighted(q, z_s - z_t + offset)
        max_s, max_t = new_max_s, new_max_t
    total_s, total_t = tl.sum(sum_s, 0), tl.sum(sum_t, 0)
    lse_s, lse_t = max_s + _log2(total_s), max_t + _log2(total_t)
    loss = tl.sum(expected, 0)
    statistic = loss
    if DIRECTION == FORWARD:
        loss = loss / tl.where(total_t == 0.0, 1.0, total_t) - ((lse_t - lse_s) - offset)
    if DIRECTION == REVERSE:
        loss = loss / tl.where(total_s == 0.0, 1.0, total_s) + ((lse_t - lse_s) - offset)
    if DIRECTION != JS:
        loss = tl.where(loss > INFINITE, float("inf"), loss)
        statistic = loss
    if DIRECTION == JS:
        sum_p = tl.zeros([BLOCK], tl.float32)
        sum_q = tl.zeros([BLOCK], tl.float32)
        for start in range(0, limit, BLOCK):
            log_q = _row(student, start + columns, limit, scale) - lse_s
            log_p = _row(teacher, start + columns, limit, scale) - lse_t
            q, p = tl.exp2(log_q), tl.exp2(log_p)
            m = beta * p + (1.0 - beta) * q
            log_m = _log2(m)
            sum_p += _weighted(tl.where(m > 0.0, p, 0.0), log_p - log_m)
            sum_q += _weighted(tl.where(m > 0.0, q, 0.0), log_q - log_m)
        statistic = tl.sum(sum_q, 0)
        loss = beta * tl.sum(sum_p, 0) + (1.0 - beta) * statistic
    is_kept = limit > 0
    tl.store(losses + row, tl.where(is_kept, loss * (LN2 * factor), 0.0))
    tl.store(statistics + row * 3, tl.where(is_kept, lse_s, 0.0))
    tl.store(statistics + row * 3 + 1, tl.where(is_kept, lse_t, 0.0))
    tl.store(statistics + row * 3 + 2, tl.where(is_kept, statistic, 0.0))


@triton.jit
def _gradient_kernel(
    student, teacher, kept, statistics, upstream, out, V, stride_s, stride_t, stride_o, scale, factor, beta,
    DIRECTION: tl.constexpr, HAS_KEPT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write out [rows, V] = factor * upstream * dD/du, 0 in rows that are not kept. ``out`` may be ``teacher``."""
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
        statistic = tl.load(statistics + row * 3 + 2)
        if DIRECTION == REVERSE:
            slope = _weighted(q, log_q - log_p - statistic) * LN2
        else:
            m = beta * p + (1.0 - beta) * q
            slope = _weighted(tl.where(m > 0.0, q, 0.0), log_q - _log2(m) - statistic) * (LN2 * (1.0 - beta))
    slope *= factor * tl.load(upstream + row).to(tl.float32)
    tl.store(out + row * stride_o + columns, slope.to(out.dtype.element_ty), columns < V)
