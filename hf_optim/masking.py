"""Masks through training: a weight that is pruned stays exactly zero, whatever the optimizer does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from .errors import ModelError, NumericalError
from .run import Run
from .toolkit import shards, sharing
from .toolkit.sparse_training import clear_running_means
from .zeroing import Zeroing

# Optimizers that leave a weight at zero whose gradient and running mean are zero, whatever its weight decay.
STAY_AT_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class MaskKeeper(TrainerCallback):
    """Applies ``run.masks`` in training. Comes after the callbacks of the steps, which may renew masks at any event.

    - Before an optimizer step, the gradients of masked weights are zeroed: they enter no running mean. Steps see the
      dense gradient in ``on_pre_optimizer_step``, since they come first; so does the clipping of the gradient norm.
    - After an optimizer step, masked weights are zeroed: weight decay, a running mean from before the mask, or a master
      copy that an optimizer keeps elsewhere cannot bring them back. Left out for optimizers that leave a weight
      at zero that has neither gradient nor running mean (``STAY_AT_ZERO``).
    - A mask that is new (another tensor than before) is applied at once, and the running means of what it masks are
      cleared: a weight that a later mask lets grow again starts without the drift of its earlier life.

    Gradient accumulation changes nothing: both happen once for each optimizer step. Of sharded parameters (FSDP2) each
    rank masks its part; ``run.masks`` holds whole masks, the same on every rank.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._known: dict[str, torch.Tensor] = {}
        self._state: tuple[list[str], list[int]] = ([], [])
        self._parameters: list[nn.Parameter] = []
        self._sharded = False
        self._zeroing = Zeroing([], [])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._known.clear()  # the model may have moved since
        self._state = ([], [])
        self._renew(kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        gradients = [parameter.grad for parameter in self._parameters]
        if self._sharded:
            gradients = [g if g is None else shards.local(g) for g in gradients]
        self._zeroing(gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        self._renew(optimizer)
        if not stays_at_zero(optimizer):
            self.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        if getattr(control, "should_save", False):
            self.apply()  # whatever another callback did to weights or running means, a checkpoint is under its masks

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_agreement(self.run)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_agreement(self.run)
        # load_best_model_at_end may have put other weights and other masks in place.
        self._renew(kwargs.get("optimizer"))
        self.apply()

    def apply(self) -> None:
        """Zero the masked weights."""
        self._zeroing([shards.local(parameter.detach()) for parameter in self._parameters])

    def _renew(self, optimizer: Any) -> None:
        masks = self.run.masks
        now = (list(masks), list(map(id, masks.values())))
        if now == self._state:
            return
        shards.reshard(self.run.model)
        found = {name: masked_parameter(self.run, name) for name in masks}
        changed = [name for name, mask in masks.items() if self._known.get(name) is not mask]
        for name in changed:
            # The one that the device has takes the other's place: no second copy.
            masks[name] = masks[name].to(shards.home_of(found[name])).contiguous()
        self._known = dict(masks)
        self._state = (list(masks), list(map(id, masks.values())))
        parts = {name: shards.local_part(masks[name], parameter) for name, parameter in found.items()}
        self._parameters = list(found.values())
        self._sharded = any(map(shards.is_sharded, self._parameters))
        self._zeroing = Zeroing(list(parts.values()), [shards.local(p.detach()) for p in self._parameters])
        apply_masks(self.run, changed)
        for name in changed:
            clear_running_means(optimizer, found[name], parts[name])


def stays_at_zero(optimizer: Any) -> bool:
    """Whether masked gradients alone keep a weight at zero that is zero and has no running mean."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # Without epsilon, 0 / 0 would be NaN.
    return type(inner) in STAY_AT_ZERO and all(group.get("eps", 1.0) > 0.0 for group in inner.param_groups)


@torch.no_grad()
def apply_masks(run: Run, names: Iterable[str] | None = None) -> None:
    """Zero the masked weights of ``run.model``: all, or those of the parameters ``names``."""
    shards.reshard(run.model)
    for name in run.masks if names is None else names:
        parameter = masked_parameter(run, name)
        shards.local(parameter).masked_fill_(~shards.local_part(run.masks[name], parameter), 0.0)


def masked_parameter(run: Run, name: str) -> nn.Parameter:
    """The parameter that a mask belongs to; inside a peft layer, that of the layer it wraps. May be sharded (FSDP2).

    Raises ``ModelError`` when it is gone, has another shape (as under FSDP1, ZeRO-3), or is a part of an adapter layer:
    those parts have other names after a merge, or none.
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
        flat = hasattr(parameter, "ds_id") or parameter.dim() == 1
        why = ": masks follow the shards of FSDP2, not those of FSDP1 or ZeRO-3; train with FSDP2, DDP or on one device"
        raise ModelError(
            f"the mask of {name} is {tuple(run.masks[name].shape)} and the parameter {tuple(parameter.shape)}"
            + why * flat
        )
    return parameter


def _inside_adapter(model: nn.Module, name: str) -> bool:
    parts = name.split(".")
    return any(hasattr(model.get_submodule(".".join(parts[:i])), "base_layer") for i in range(1, len(parts) - 1))


def stray_weights(run: Run) -> list[str]:
    """The parameters that have non-zero weights where their mask says there are none; of shards, in this rank's."""
    shards.reshard(run.model)
    found = []
    for name in run.masks:
        parameter = masked_parameter(run, name)
        weight = shards.local(parameter.detach())
        if bool((weight != 0).logical_and_(~shards.local_part(run.masks[name], parameter)).any()):
            found.append(name)
    return found


def require_agreement(run: Run) -> None:
    """Raise ``NumericalError`` naming the first parameter of which two ranks have different masks.

    A step that draws random numbers without a generator of its own, seeded alike on all ranks, would let each train
    another model.
    """
    if sharing.ranks() == 1:
        return
    names = sorted(run.masks)
    mine = torch.tensor([len(names), *(number for name in names for number in _digest(run.masks[name]))])
    device = next(run.model.parameters()).device
    apart = _apart(mine[:1].to(device)) or _apart(mine.to(device))
    if apart:
        where = names[(apart[0] - 1) // 2] if apart[0] else "their number"
        raise NumericalError(
            f"the ranks have different masks ({where} is the first): a step chooses them by random numbers that are "
            "not seeded alike, or by what only one rank has seen"
        )


def _apart(numbers: torch.Tensor) -> list[int]:
    """The places at which ranks have different numbers."""
    low, high = sharing.reduce_(numbers.clone(), "min"), sharing.reduce_(numbers.clone(), "max")
    return (low != high).nonzero().flatten().tolist()


def _digest(mask: torch.Tensor) -> tuple[int, int]:
    """Two numbers that tell masks apart: weighted sums over rows and over columns of how many weights are kept."""
    matrix = mask.reshape(mask.shape[0] if mask.dim() else 1, -1)
    rows, columns = matrix.sum(1), matrix.sum(0)
    weights = [torch.arange(1, len(counts) + 1, device=mask.device) for counts in (rows, columns)]
    return int((rows * weights[0]).sum()), int((columns * weights[1]).sum())
