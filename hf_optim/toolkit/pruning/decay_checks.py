"""Checks of a weight decay ``W -= γ λ W`` at a learning rate ``γ``: strong enough to matter, weak enough to converge.

A step takes off the share ``γ λ`` of a weight. Above 1 the sign of the weight turns at every step, and above 2 the
weight grows without bound; a share that is tiny over the whole training does nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from ...errors import RecipeError

# The share of a weight that must decay over the whole training for the term to have an effect.
LEAST_DECAY = 0.01
# What all steps together take off in the training of SR-STE's paper at its highest rate, in weights: 0.1 * 2e-4 * 5e5.
TOTAL_DECAY = 10.0
# The largest share of a weight that a step takes off by default.
MOST_PER_STEP = 0.1


def following_decay(rate: float, max_steps: int) -> float:
    """Return the decay ``λ`` whose total over a training is that of SR-STE's paper, whatever the learning rate.

    ``γ λ = 10 / steps``, at most 0.1, at the highest rate; 0 for a rate of 0.

    Args:
        rate: the highest learning rate ``γ``.
        max_steps: optimizer steps of the training.
    """
    return min(MOST_PER_STEP, TOTAL_DECAY / max(1, max_steps)) / rate if rate > 0.0 else 0.0


def negligible_decay(rate: float, decay: float, max_steps: int) -> str:
    """Return a warning if ``decay`` takes off less than 1 % of a weight in the whole training, else an empty string.

    A decay of 0 is not warned about: it turns the term off.

    Args:
        rate: the highest learning rate ``γ``.
        decay: ``λ``.
        max_steps: optimizer steps of the training.
    """
    share = rate * decay * max_steps
    if not 0.0 < share < LEAST_DECAY:
        return ""
    return (
        f"at a learning rate of {rate:g} and a decay of {decay:g}, weights that are masked out lose at most "
        f"{100 * share:.2g} % in {max_steps} steps, which is the plain straight-through estimator; a decay of about "
        f"{following_decay(rate, max_steps):.2g} has an effect, which is the default (decay: null)"
    )


def check_decay_stability(rate: float, decay: float, label: str) -> None:
    """Raise ``RecipeError`` if one step takes off more than the whole weight, so that its sign turns.

    Args:
        rate: the highest learning rate ``γ``.
        decay: ``λ``.
        label: the step, for the message (``run.label(step)``).
    """
    if rate * decay > 1.0:
        raise RecipeError(
            f"{label}: at a learning rate of {rate:g}, a decay of {decay:g} takes {rate * decay:.3g} times a weight "
            "off it in one step, which turns its sign and, above 2, lets it grow: set decay to about "
            f"{0.1 / rate:.2g}, or lower the learning rate"
        )


def peak_rate(optimizer: Any, scheduler: Any, weights: Iterable[Tensor], max_steps: int) -> float:
    """Return the highest learning rate of any of ``weights`` in a training of ``max_steps`` optimizer steps.

    A scheduler other than ``LambdaLR`` is assumed to start at its highest rate.
    """
    wanted, highest = {id(weight) for weight in weights}, 0.0
    lambdas = scheduler.lr_lambdas if isinstance(scheduler, LambdaLR) else [None] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, lambdas, strict=True):
        if any(id(parameter) in wanted for parameter in group["params"]):
            most = 1.0 if factor is None else max(factor(step) for step in range(max(1, max_steps)))
            highest = max(highest, float(group.get("initial_lr", group["lr"])) * most)
    return highest
