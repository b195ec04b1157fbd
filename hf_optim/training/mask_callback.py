"""Masks during training: a pruned weight stays exactly zero, whatever the optimizer does."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from ..runs import training_watch
from ..runs.masking import apply_masks, masked_parameter, require_equal_masks
from ..runs.run import Run
from ..toolkit.distributed import fsdp
from ..toolkit.pruning.masked_layers import clear_running_means
from .fused_masking import FusedMasking

# Optimizers that keep a zero weight at zero if its gradient and running mean are zero, whatever its weight decay.
STAY_AT_ZERO = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


class MaskCallback(TrainerCallback):
    """Applies ``run.masks`` during training. The callbacks of the steps come before it and may change masks.

    - Before an optimizer step, the gradients of masked weights are zeroed, so they do not enter running means. Steps
      see the dense gradient in ``on_pre_optimizer_step``, since their callbacks come first; so does gradient clipping.
    - After an optimizer step, masked weights are zeroed, so weight decay, a running mean from before the mask, or a
      master copy of the optimizer cannot restore them. Left out for optimizers that keep a weight without gradient and
      running mean at zero (``STAY_AT_ZERO``).
    - A new mask (another tensor than before) is applied at once, and the running means of what it masks are cleared: a
      weight that a later mask lets grow again starts without its former momentum.

    Gradient accumulation changes nothing: both happen once per optimizer step. Of sharded parameters (FSDP2) each rank
    masks its part; ``run.masks`` holds whole masks, the same on every rank.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._known: dict[str, torch.Tensor] = {}
        self._state: tuple[list[str], list[int]] = ([], [])
        self._parameters: list[nn.Parameter] = []
        self._sharded = False
        self._zeroing = FusedMasking([], [])

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        training_watch.unwatch(self.run.model)
        self._known.clear()  # the model may have moved since
        self._state = ([], [])
        self._renew(kwargs.get("optimizer"))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        gradients = [parameter.grad for parameter in self._parameters]
        if self._sharded:
            gradients = [g if g is None else fsdp.local_shard(g) for g in gradients]
        self._zeroing(gradients)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = kwargs.get("optimizer")
        self._renew(optimizer)
        if not stays_at_zero(optimizer):
            self.apply()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._renew(kwargs.get("optimizer"))
        if getattr(control, "should_save", False):
            self.apply()  # a checkpoint obeys its masks, whatever another callback did to weights

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_equal_masks(self.run)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        require_equal_masks(self.run)
        # load_best_model_at_end may have put other weights and other masks in place.
        self._renew(kwargs.get("optimizer"))
        self.apply()
        if self.run.announce:
            training_watch.watch(self.run, self.run.model)  # another training may come without callbacks

    def apply(self) -> None:
        """Zero the masked weights."""
        self._zeroing([fsdp.local_shard(parameter.detach()) for parameter in self._parameters])

    def _renew(self, optimizer: Any) -> None:
        masks = self.run.masks
        now = (list(masks), list(map(id, masks.values())))
        if now == self._state:
            return
        fsdp.reshard(self.run.model)
        found = {name: masked_parameter(self.run, name) for name in masks}
        changed = [name for name, mask in masks.items() if self._known.get(name) is not mask]
        for name in changed:
            # The copy on the device replaces the other, so that there is only one.
            masks[name] = masks[name].to(fsdp.mask_device(found[name])).contiguous()
        self._known = dict(masks)
        self._state = (list(masks), list(map(id, masks.values())))
        parts = {name: fsdp.shard_like(masks[name], parameter) for name, parameter in found.items()}
        self._parameters = list(found.values())
        self._sharded = any(map(fsdp.is_sharded, self._parameters))
        self._zeroing = FusedMasking(list(parts.values()), [fsdp.local_shard(p.detach()) for p in self._parameters])
        apply_masks(self.run, changed)
        for name in changed:
            clear_running_means(optimizer, found[name], parts[name])


def stays_at_zero(optimizer: Any) -> bool:
    """Return True if masking gradients is enough to keep a zero weight without running mean at zero."""
    inner = getattr(optimizer, "optimizer", optimizer)
    # Without epsilon, 0 / 0 would be NaN.
    return type(inner) in STAY_AT_ZERO and all(group.get("eps", 1.0) > 0.0 for group in inner.param_groups)
