"""Masks through training: a weight that is pruned stays exactly zero, whatever the optimizer does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .errors import ModelError
from .run import Run

# How torch.optim (and the optimizers that follow it) name the running mean of gradients in their state.
MOMENTUM = ("exp_avg", "momentum_buffer")


class MaskKeeper(TrainerCallback):
    """Applies ``run.masks`` in training. Comes after the callbacks of the steps, which may renew masks at any event.

    - Before an optimizer step, the gradients of masked weights are zeroed: they enter no running mean. Steps see the
      dense gradient in ``on_pre_optimizer_step``, since they come first; so does the clipping of the gradient norm.
    - After an optimizer step, masked weights are zeroed: weight decay, a running mean from before the mask, or a master
      copy that an optimizer keeps elsewhere cannot bring them back.
    - A mask that is new (another tensor than before) is applied at once, and the running means of what it masks are
      cleared: a weight that a later mask lets grow again starts without the drift of its earlier life.

    Gradient accumulation changes nothing: both happen once for each optimizer step.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._known: dict[str, torch.Tensor] = {}
        self._groups: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._known.clear()  # the model may have moved since
        self._renew(kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        for parameters, masks in self._groups:
            pairs = [(p.grad, m) for p, m in zip(parameters, masks, strict=True) if p.grad is not None]
            if pairs:
                torch._foreach_mul_([gradient for gradient, _ in pairs], [mask for _, mask in pairs])

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        self.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # load_best_model_at_end may have put other weights and other masks in place.
        self._renew(kwargs.get("optimizer"))
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked weights."""
        for parameters, masks in self._groups:
            torch._foreach_mul_(parameters, masks)

    def _renew(self, optimizer: Any) -> None:
        masks = self.run.masks
        changed = [name for name, mask in masks.items() if self._known.get(name) is not mask]
        if not changed and len(masks) == len(self._known):
            return
        found = {name: masked_parameter(self.run, name) for name in masks}
        for name in changed:
            # The one that the device has takes the other's place: no second copy.
            masks[name] = masks[name].to(found[name].device)
        self._known = dict(masks)
        groups: dict[Any, tuple[list[torch.Tensor], list[torch.Tensor]]] = defaultdict(lambda: ([], []))
        for name, parameter in found.items():
            group = groups[parameter.device, parameter.dtype]
            group[0].append(parameter)
            group[1].append(masks[name])
        self._groups = list(groups.values())
        apply_masks(self.run, changed)
        for name in changed:
            _clear_momentum(optimizer, found[name], masks[name])


@torch.no_grad()
def apply_masks(run: Run, names: Iterable[str] | None = None) -> None:
    """Zero the masked weights of ``run.model``: all, or those of the parameters ``names``."""
    for name in run.masks if names is None else names:
        parameter = masked_parameter(run, name)
        parameter.mul_(run.masks[name].to(parameter.device))


def masked_parameter(run: Run, name: str) -> nn.Parameter:
    """The parameter that a mask belongs to; inside a peft layer, that of the layer it wraps.

    Raises ``ModelError`` when it is gone, has another shape (as under sharded training: FSDP, ZeRO-3), or is a part of
    an adapter layer: those parts have other names after a merge, or none.
    """
    try:
        parameter = run.model.get_parameter(name)
    except AttributeError as error:
        raise ModelError(f"{name} has a mask, but {type(run.model).__name__} has no such parameter: {error}") from error
    if _inside_adapter(run.model, name):
        raise ModelError(
            f"{name} has a mask and lies inside an adapter layer: a step that chooses masks during training needs a "
            "model without adapters; train it first and add adapters for recovery, or merge them before"
        )
    if parameter.shape != run.masks[name].shape:
        raise ModelError(
            f"the mask of {name} is {tuple(run.masks[name].shape)} and the parameter {tuple(parameter.shape)}: masks "
            "work on whole parameters; train on one device or with DDP, not with sharded parameters (FSDP, ZeRO-3)"
        )
    return parameter


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:i])), "base_layer") for i in range(1, len(parts) - 1))


def stray_weights(run: Run) -> list[str]:
    """The parameters that have non-zero weights where their mask says there are none."""
    found = []
    for name in run.masks:
        weight = masked_parameter(run, name).detach()
        if bool((weight != 0).logical_and_(~run.masks[name].to(weight.device)).any()):
            found.append(name)
    return found


def _clear_momentum(optimizer: Any, parameter: nn.Parameter, mask: torch.Tensor) -> None:
    state = getattr(optimizer, "state", None) or {}
    for key, value in state.get(parameter, {}).items():
        if key in MOMENTUM and isinstance(value, torch.Tensor) and value.shape == mask.shape:
            value.mul_(mask.to(value.device))
