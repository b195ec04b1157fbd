"""Rewinding: restart learning-rate schedules, and restore or reinitialize weights."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel

from ...errors import RecipeError

LRMultiplier = Callable[[int], float]


def require_lambda_lr(scheduler: Any, label: str) -> LambdaLR:
    """Return the scheduler if its learning rates are a function of the step; raise ``RecipeError`` otherwise."""
    if isinstance(scheduler, LambdaLR):
        return scheduler
    raise RecipeError(
        f"{label}: a {type(scheduler).__name__} cannot return to an earlier step, because its learning rates are not a "
        "function of the step; use a schedule such as linear, cosine or constant (torch's LambdaLR, or any of "
        "transformers.get_scheduler but reduce_lr_on_plateau and greedy)"
    )


def seek_scheduler_(scheduler: LambdaLR, position: int) -> None:
    """Set a scheduler to ``position``: the next optimizer step uses the learning rate of that position."""
    rates = [base * rate(position) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch = position
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def hold_after(rate: LRMultiplier, length: int, held: float | None = None) -> LRMultiplier:
    """Return a multiplier that is ``rate`` before position ``length``, and constant from there on.

    The constant is ``held``, or the last value of ``rate`` if that is None.
    """
    last = rate(length - 1) if held is None else held

    # A plain function, because a scheduler stores the attributes of other callables in its state.
    def multiplier(position: int) -> float:
        return rate(position) if position < length else last

    return multiplier


@torch.no_grad()
def copy_state_(model: nn.Module, other: nn.Module) -> None:
    """Copy the parameters and persistent buffers of ``other``, a model of the same class, into ``model``.

    Raises ``KeyError`` for a tensor that ``other`` does not have.
    """
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(theirs[name])


def reinitialized_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Build a model of the same class and configuration on the CPU, with the random initialization of its class.

    The state of the random generator is restored.
    """
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        return type(model)(deepcopy(model.config))
    finally:
        torch.random.set_rng_state(before)
