"""The specification of one step of adaptive computation time in plain PyTorch, and its gradient.

For a token that runs, with the state s after this step, the sum P of its probabilities before it and the mixture y so
far (Graves, arXiv 1603.08983, equations 4 to 8; ``r`` is what the halting unit reads, s or the input of the step)::

    p = sigmoid(w r + b)
    halts: P + p >= 1 - eps, or the step is the last       c = 1 - P,  R' = 1 - P,  P' = P
    runs on: otherwise                                     c = p,      R' = R,      P' = P + p
    y' = y + c s;   blend: y' = c s + (1 - c) y            N' = N + 1

A token that does not run (halted, or padding) keeps P, R, N and y, whatever its state is.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Accumulators(NamedTuple):
    """What a token keeps from step to step; ``...`` are the dimensions of tokens.

    Attributes:
        total: ``[...]`` float32 (float64 for float64): the sum of the probabilities of past steps while it runs.
        remainder: ``[...]``, as ``total``: R, 0 until it halts.
        steps: int64 ``[...]``: N so far.
        running: bool ``[...]``.
        output: ``[..., d]``, as ``total``: the mixture y.
    """

    total: Tensor
    remainder: Tensor
    steps: Tensor
    running: Tensor
    output: Tensor


class Gradients(NamedTuple):
    """Gradients with respect to what a step reads; ``read`` and ``output`` are empty where they are not needed."""

    state: Tensor
    read: Tensor
    weight: Tensor
    bias: Tensor
    total: Tensor
    remainder: Tensor
    output: Tensor


def halting_step(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, before: Accumulators, epsilon: float, last: bool,
    blend: bool,
) -> tuple[Accumulators, Tensor]:  # fmt: skip
    """Return the accumulators after a step, and p ``[...]`` in the dtype of ``total``.

    Args:
        state: ``[..., d]``, any floating dtype; computed in that of ``before.output``.
        read: ``[..., d]``: what the halting unit reads; None for ``state``.
        weight, bias: ``[d]`` and ``[]``, of the halting unit.
        epsilon: a token halts when its probabilities reach 1 - epsilon.
        last: no token runs on.
        blend: the mixture of the authors' code, in place of the sum.
    """
    wide = before.output.dtype
    shown = state if read is None else read
    p = ((shown.to(wide) * weight.to(wide)).sum(-1) + bias.to(wide)).sigmoid()
    running, rest = before.running, 1 - before.total
    runs = running & (torch.zeros_like(running) if last else ~(before.total + p >= 1 - epsilon))
    halts = running & ~runs
    share = torch.where(halts, rest, p)[..., None]
    kept = (1 - share) * before.output if blend else before.output
    after = Accumulators(
        torch.where(runs, before.total + p, before.total),
        torch.where(halts, rest, before.remainder),
        before.steps + running,
        runs,
        torch.where(running[..., None], kept + share * state.to(wide), before.output),
    )
    return after, p


def gradient(
    state: Tensor, read: Tensor | None, weight: Tensor, bias: Tensor, total: Tensor, running: Tensor,
    output: Tensor | None, runs: Tensor, p: Tensor, upstream: tuple[Tensor | None, Tensor | None, Tensor | None],
) -> Gradients:  # fmt: skip
    """Return the gradients of a step.

    Args:
        total, running: before the step.
        output: before the step, if it blends; None for the sum, whose gradient does not depend on it.
        runs: bool ``[...]``, the tokens that ran on after it.
        p: ``[...]``, its probabilities.
        upstream: gradients of total, remainder and output after it; None for zero.

    Returns:
        ``read`` is empty if it was None (``state`` has it all), and so is ``output``, whose gradient is the upstream.
    """
    up_total, up_remainder = (torch.zeros_like(p) if part is None else part for part in upstream[:2])
    up_output = state.new_zeros(state.shape, dtype=p.dtype) if upstream[2] is None else upstream[2]
    wide, halts = p.dtype, running & ~runs
    share = torch.where(halts, 1 - total, torch.where(runs, p, 0.0))[..., None]
    mixed = state.to(wide) if output is None else state.to(wide) - output
    slope = torch.where(running[..., None], up_output * mixed, 0.0).sum(-1)
    logit = torch.where(runs, (slope + up_total) * p * (1 - p), 0.0)
    shown = torch.where(runs[..., None], (state if read is None else read).to(wide), 0.0)
    of_state, of_read = share * up_output, logit[..., None] * weight.to(wide)
    if read is None:
        of_state = of_state + of_read
    return Gradients(
        of_state.to(state.dtype),
        state.new_empty(0) if read is None else of_read.to(read.dtype),
        (logit[..., None] * shown).flatten(0, -2).sum(0).to(weight.dtype),
        logit.sum().to(bias.dtype),
        torch.where(halts, up_total - slope - up_remainder, up_total),
        torch.where(halts, 0.0, up_remainder),
        p.new_empty(0) if output is None else (1 - share) * up_output,
    )
