"""The Triton kernels of a step in which tokens halt (specified by ``naive``).

A program has the whole states of a few tokens in registers: their product with the weight of the halting unit decides
how they are mixed into the output, so each state is read once. Those of tokens that do not run are not read. Nothing is
added up between programs in an order that varies: programs of the gradient write their sums over tokens, and a second
launch adds these.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _step_kernel(
    state, read, weight, bias, total, remainder, steps, running, output,
    new_total, new_remainder, new_steps, new_running, new_output, probability, threshold, T, D,
    LAST: tl.constexpr, BLEND: tl.constexpr, APART: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Advance ``ROWS`` tokens.

    ``state`` and ``read`` [T, D]; APART: they differ. ``weight`` [D], ``bias`` []; ``output`` float32 [T, D]; of each
    token ``total``, ``remainder`` and ``probability`` float32, ``steps`` int64, ``running`` uint8. ``threshold`` is
    1 - epsilon. BLOCK is D or the next power of two.
    """
    t, d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside, column = t < T, d < D
    runs = tl.load(running + t, inside, 0) != 0
    at = t.to(tl.int64)[:, None] * D + d[None, :]
    shown = runs[:, None] & column[None, :]
    whole = inside[:, None] & column[None, :]
    s = tl.load(state + at, shown, 0.0).to(tl.float32)
    y = tl.load(output + at, whole, 0.0)
    w = tl.load(weight + d, column, 0.0).to(tl.float32)
    r = tl.load(read + at, shown, 0.0).to(tl.float32) if APART else s
    z = tl.sum(r * w[None, :], 1) + tl.load(bias).to(tl.float32)
    p = 1.0 / (1.0 + tl.exp(-z))
    before = tl.load(total + t, inside, 0.0)
    # A probability that is not a number halts no token before the last step.
    on = runs & (t < 0) if LAST else runs & ~(before + p >= threshold)
    halts = runs & ~on
    share = tl.where(halts, 1.0 - before, p)[:, None]
    mixed = y + share * s
    if BLEND:
        mixed = share * s + (1.0 - share) * y
    tl.store(new_output + at, tl.where(runs[:, None], mixed, y), whole)
    tl.store(new_total + t, tl.where(on, before + p, before), inside)
    tl.store(new_remainder + t, tl.where(halts, 1.0 - before, tl.load(remainder + t, inside, 0.0)), inside)
    tl.store(new_steps + t, tl.load(steps + t, inside, 0) + runs.to(tl.int64), inside)
    tl.store(new_running + t, on.to(tl.uint8), inside)
    tl.store(probability + t, p, inside)


@triton.jit
def _gradient_kernel(
    state, read, weight, output, total, running, new_running, probability, up_total, up_remainder, up_output,
    of_state, of_read, of_total, of_remainder, of_output, sums, T, D,
    BLEND: tl.constexpr, APART: tl.constexpr, HAS_TOTAL: tl.constexpr, HAS_REMAINDER: tl.constexpr,
    HAS_OUTPUT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of tokens, ``ROWS`` at a time, and of a program's tokens the sums ``sums[program]``.

    Tensors as in ``_step_kernel``; ``up_*`` are the gradients of what it wrote, ``of_*`` of what it read. ``sums``
    float32 [programs, D + 1]: the gradient of ``weight``, then of ``bias``.
    """
    program, d = tl.program_id(0), tl.arange(0, BLOCK)
    column = d < D
    w = tl.load(weight + d, column, 0.0).to(tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    biases = tl.zeros([ROWS], tl.float32)
    for block in range(program, tl.cdiv(T, ROWS), tl.num_programs(0)):
        t = block * ROWS + tl.arange(0, ROWS)
        inside = t < T
        runs = tl.load(running + t, inside, 0) != 0
        on = tl.load(new_running + t, inside, 0) != 0
        halts = runs & ~on
        at = t.to(tl.int64)[:, None] * D + d[None, :]
        shown, whole = runs[:, None] & column[None, :], inside[:, None] & column[None, :]
        p = tl.load(probability + t, inside, 0.0)
        before = tl.load(total + t, inside, 0.0)
        share = tl.where(halts, 1.0 - before, tl.where(on, p, 0.0))
        s = tl.load(state + at, shown, 0.0).to(tl.float32)
        r = tl.load(read + at, on[:, None] & column[None, :], 0.0).to(tl.float32) if APART else s
        g = tl.zeros([ROWS, BLOCK], tl.float32)
        if HAS_OUTPUT:
            g = tl.load(up_output + at, whole, 0.0)
        if BLEND:
            slope = tl.sum(g * (s - tl.load(output + at, shown, 0.0)), 1)
            tl.store(of_output + at, (1.0 - share)[:, None] * g, whole)
        else:
            slope = tl.sum(g * s, 1)
        slope = tl.where(runs, slope, 0.0)
        up = tl.zeros([ROWS], tl.float32)
        if HAS_TOTAL:
            up = tl.load(up_total + t, inside, 0.0)
        rest = tl.zeros([ROWS], tl.float32)
        if HAS_REMAINDER:
            rest = tl.load(up_remainder + t, inside, 0.0)
        logit = tl.where(on, (slope + up) * p * (1.0 - p), 0.0)
        tl.store(of_total + t, tl.where(halts, up - slope - rest, up), inside)
        tl.store(of_remainder + t, tl.where(halts, 0.0, rest), inside)
        direct, through = share[:, None] * g, logit[:, None] * w[None, :]
        if APART:
            tl.store(of_read + at, through.to(of_read.dtype.element_ty), whole)
        else:
            direct += through
        tl.store(of_state + at, direct.to(of_state.dtype.element_ty), whole)
        weights += tl.sum(tl.where(on[:, None], logit[:, None] * r, 0.0), 0)
        biases += logit
    row = sums + program.to(tl.int64) * (D + 1)
    tl.store(row + d, weights, column)
    tl.store(row + D, tl.sum(biases, 0))


@triton.jit
def _sums_kernel(sums, of_weight, of_bias, P, D, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up ``sums`` float32 [P, D + 1] into ``of_weight`` [D] and ``of_bias`` []: ``BLOCK`` columns a program."""
    d = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    added = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, P, ROWS):
        row = first + tl.arange(0, ROWS)
        at = row.to(tl.int64)[:, None] * (D + 1) + d[None, :]
        added += tl.load(sums + at, (row < P)[:, None] & (d <= D)[None, :], 0.0)
    found = tl.sum(added, 0)
    tl.store(of_weight + d, found.to(of_weight.dtype.element_ty), d < D)
    tl.store(of_bias + d - D, found.to(of_bias.dtype.element_ty), d == D)
