"""Classes of models whose tokens halt.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from hf_optim.toolkit.modules import (
    RefusedByStock,
    TiedModel,
    read_own_loss,
    read_tied_blocks,
    tie_blocks,
    watch_own_loss,
)

from ._halted_attention import NAME
from ._halting import HaltingPassage, HaltingStep, HaltingUnit, Pondered, Rule

ACT = "act"  # the field of the configuration: the settings, a dict; under ``tied`` those of the tied blocks


def add_halting(model: Any, settings: Any) -> list[HaltingStep]:
    """Tie the blocks of a model and let its tokens halt, in place; return the steps. Raises ``ValueError``."""
    if not isinstance(settings, Mapping):
        raise ValueError(f"config.{ACT} has the settings of halting, not {str(settings)[:80]!r}")
    tied = read_tied_blocks(settings.get("tied"))
    passage = HaltingPassage(Rule.read(settings, tied["steps"]))
    bias = settings.get("bias")
    if not isinstance(bias, (int, float)) or isinstance(bias, bool):
        raise ValueError(f"act: bias is a number, not {str(bias)[:80]!r}")
    unknown = sorted(str(name)[:40] for name in settings.keys() - {"tied", "bias", *Rule.__dataclass_fields__})
    if unknown:
        raise ValueError(f"config.{ACT} has settings that are not known: {unknown[:4]}")
    steps: list[Any] = tie_blocks(model, tied, HaltingStep, passage)
    weight = next(p for p in steps[0].block.parameters() if p.is_floating_point())
    unit = HaltingUnit(tied["width"], float(bias), dtype=weight.dtype, device=weight.device)
    steps[0].halting_unit = unit.train(model.training)
    for step in steps:
        for module in step.block.modules():
            if hasattr(module, "is_causal"):
                vars(module)["passage"] = passage
    return steps


def passage_of(model: Any) -> HaltingPassage:
    """Return what the steps of a model know of its forward."""
    return next(vars(m)["passage"] for m in model.modules() if "halting_unit" in m._modules)


class HaltingConfig(RefusedByStock):
    """Base of the configuration classes: whatever implementation a caller asks for, attention is that of halting."""

    @property
    def _attn_implementation(self) -> str | None:
        return None if self._attn_implementation_internal is None else NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)  # type: ignore[attr-defined]


class HaltingModel(TiedModel):
    """Base of the model classes: in training, the cost of pondering is a part of the loss."""

    tied_field = ACT

    def tie(self, settings: Any) -> None:
        add_halting(self, settings)

    @property
    def pondered(self) -> Pondered | None:
        """What the last forward took: ``steps`` and ``remainder`` of each token, and the ``cost``."""
        read_own_loss(self)
        return passage_of(self).pondered

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        config: Any = self.config  # type: ignore[attr-defined]
        passage = passage_of(self)
        passage.check({name: getattr(config, name, None) for name in ("output_hidden_states", "output_attentions")})
        passage.check(kwargs)
        outputs = super().__call__(*args, **kwargs)
        cost = passage.rule.ponder_cost
        if cost:
            watch_own_loss(self, kwargs, "the cost of pondering", f"{cost} * model.pondered.cost")
        loss = _loss_of(outputs, kwargs)
        if not (self.training and cost and loss is not None and passage.pondered is not None):  # type: ignore[attr-defined]
            return outputs
        total = loss + cost * _share(kwargs) * passage.pondered.cost.to(loss)
        if isinstance(outputs, tuple):
            return (total, *outputs[1:])
        outputs["loss"] = total
        return outputs


def _loss_of(outputs: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the loss of a model with a head; None if it computed none."""
    if isinstance(outputs, tuple):
        labelled = kwargs.get("labels") is not None and outputs and isinstance(outputs[0], Tensor)
        return outputs[0] if labelled and not outputs[0].dim() else None
    loss = getattr(outputs, "loss", None)
    return loss if isinstance(loss, Tensor) and not loss.dim() else None


def _share(kwargs: Mapping[str, Any]) -> Any:
    """Return the share of a batch in its optimizer step, by labels, where a Trainer says how many that step has."""
    items, labels = kwargs.get("num_items_in_batch"), kwargs.get("labels")
    if items is None or not isinstance(labels, Tensor):
        return 1.0
    count = (labels[..., 1:] != -100).sum() if labels.dim() > 1 else (labels != -100).sum()
    return (count / torch.as_tensor(items, device=labels.device).clamp_min(1)).clamp_max(1.0)
