"""Noticing that a pruned model, or one that waits for training, is trained without the callbacks of hf_optim.

A stock ``Trainer`` or a loop of one's own does not know that masks exist: its first optimizer step ends the sparsity.
While there are such models, a hook of ``torch.optim`` looks once at each optimizer: whether it has weights of one of
them. It is not in the forward, so evaluation, calibration and ``torch.compile`` do not meet it. Adapters on a frozen
model are other parameters and give no warning. ``hf_optim.callbacks``, ``OptimTrainer``, ``Rounds`` and ``keep_masks``
end the watch: they keep the masks.
"""

from __future__ import annotations

import logging
import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..recipes.contract import TRAINER_HOOKS
from .run import Run, find_run

log = logging.getLogger(__name__)

REMEDY = "train with hf_optim.OptimTrainer, or with Trainer(callbacks=hf_optim.callbacks(model))"

_watched: dict[int, tuple[weakref.ref[nn.Module], frozenset[int]]] = {}
"""Id of a model -> the model, and the ids of its parameters that must not be trained unnoticed."""
_seen: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()
"""Optimizers that were looked at since the last model was added."""
_handle: Any = None


def remedy(run: Run) -> str:
    """Return how a model is trained that a run has pruned, or that waits for training."""
    steps = run.stage.steps if run.stage is not None else ()
    if any(step.implements(hook) for step in steps for hook in TRAINER_HOOKS):
        return "train with hf_optim.OptimTrainer"  # a stock Trainer has no callback for these hooks
    return REMEDY


def watch(run: Run, model: nn.Module) -> None:
    """Warn at the first optimizer step on ``model`` that the callbacks of its run do not know of."""
    global _handle
    parameters = _parameters(run, model)
    if not parameters:
        unwatch(model)
        return
    key = id(model)
    _watched[key] = weakref.ref(model, lambda gone: _forget(key, gone)), frozenset(map(id, parameters))
    _seen.clear()
    if _handle is None:
        _handle = register_optimizer_step_pre_hook(_look)


def unwatch(model: nn.Module) -> None:
    """End the watch of a model: it is trained with callbacks, or has no run any more."""
    _forget(id(model), None)


def _forget(key: int, gone: weakref.ref[nn.Module] | None) -> None:
    global _handle
    if gone is None or (key in _watched and _watched[key][0] is gone):
        _watched.pop(key, None)
    if not _watched and _handle is not None:
        _handle.remove()
        _handle = None


def _parameters(run: Run, model: nn.Module) -> list[nn.Parameter]:
    """Return the masked parameters, or all of a model for whose training a step has hooks."""
    stage = run.stage
    if stage is not None and run.stage_entered:
        hooks = ("training_callbacks", *TRAINER_HOOKS)
        if any(step.implements(hook) for step in stage.steps for hook in hooks):
            return list(model.parameters())
    named = dict(model.named_parameters(remove_duplicate=False))
    return [named[name] for name in run.masks if name in named]


def _look(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> None:
    """Warn if an optimizer, at its first step, has a gradient for a weight of a watched model."""
    if optimizer in _seen:
        return
    _seen.add(optimizer)
    trained = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
    for key, (reference, parameters) in list(_watched.items()):
        model = reference()
        if model is None or not trained & parameters:
            continue
        run = find_run(model)
        # The parameters of a model may have been exchanged since, and an id used again.
        if run is not None and any(id(p) in trained and id(p) in parameters for p in model.parameters()):
            _warn(run, model)
        _forget(key, None)


def _warn(run: Run, model: nn.Module) -> None:
    run.trained_alone = True
    kind = type(model).__name__
    if run.stage is not None and run.stage_entered:
        log.warning(
            "%s waits for training, and this training of %s runs without its callbacks, so it has no effect: %s",
            run.stage,
            kind,
            remedy(run),
        )
    else:
        log.warning(
            "%s was pruned, and this training runs without hf_optim's callbacks: its zeros do not stay zero: "
            "%s (hf_optim.release(model) gives the zeros up)",
            kind,
            REMEDY,
        )
