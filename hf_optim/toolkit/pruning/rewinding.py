"""Learning-rate schedules that start again, and weights that go back to what they were."""

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
    """The scheduler, if its learning rates are a function of a position. Raises ``RecipeError`` for another."""
    if isinstance(scheduler, LambdaLR):
        return scheduler
    raise RecipeError(
        f"{label}: a {type(scheduler).__name__} cannot be put back to an earlier step, since its learning rates are no "
        "function of the step; take a schedule such as linear, cosine or constant (torch's LambdaLR, or any of "
        "transformers.get_scheduler but reduce_lr_on_plateau and greedy)"
    )


def seek_scheduler_(scheduler: LambdaLR, position: int) -> None:
    """Put a scheduler to a position: the optimizer's next step has the learning rate that stands there."""
    rates = [base * rate(position) for base, rate in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
    scheduler.last_epoch = position
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
    scheduler._last_lr = rates


def hold_after(rate: LRMultiplier, length: int, held: float | None = None) -> LRMultiplier:
    """``rate`` for the positions of a phase, and from ``length`` on ``held``; None holds the rate of the last one."""
    last = rate(length - 1) if held is None else held

    # A plain function: a scheduler keeps the attributes of other callables in its state.
    def multiplier(position: int) -> float:
        return rate(position) if position < length else last

    return multiplier


@torch.no_grad()
def copy_state_(model: nn.Module, other: nn.Module) -> None:
    """Give a model the parameters and persistent buffers of another one of its class, in place.

    Raises ``KeyError`` for one that the other has not.
    """
    theirs = other.state_dict()
    for name, tensor in model.state_dict().items():
        tensor.copy_(theirs[name])


def reinitialized_copy(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A model of the same class and configuration, with random weights as its class draws them, on the CPU.

    Random state is as before afterwards.
    """
    before = torch.random.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        return type(model)(deepcopy(model.config))
    finally:
        torch.random.set_rng_state(before)
