"""Adapters (peft) on an optimized model: recovery after pruning or quantization, and merging.

Up to the merge everything is stock: ``peft.get_peft_model(model, LoraConfig(...))`` on a pruned or quantized model, a
``Trainer`` with ``hf_optim.callbacks(model)`` (or ``OptimTrainer``), ``save_pretrained`` for the adapter alone. A
quantized layer is an ``nn.Linear`` whose weight holds the decoded values, so peft puts its ordinary LoRA layer around
it.

Merging is where an optimized model differs. ``W + s B A`` is dense, though ``W`` is sparse; and it lies between the
points of a grid, though ``W`` lies on one.

- *Pruned*: ``merge_adapters`` masks the sum again. What the adapter added outside the mask is lost, and the merged
  model differs from the one that was trained, unless the adapter learned under the mask (``keep_masks``): then merging
  is exact.
- *Quantized*: ``merge_adapters`` refuses. Keep the adapter beside the model, or merge into the dense model and quantize
  that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..compressed.state import quantized_modules
from ..errors import OptimError
from ..lifecycle.stages import end_training
from ..runs import training_watch
from ..runs.masking import Masked, apply_masks
from ..runs.run import Run, find_run, require_sound
from ..runs.stored_zeros import known_zeros

log = logging.getLogger(__name__)

HOOK = "_hf_optim_mask_hook"


@dataclass(frozen=True)
class Pruned:
    """A model without a run, and the masks of the zeros that its checkpoint's record tells of."""

    model: Any
    masks: dict[str, Tensor]


def merge_adapters(model: nn.Module, **kwargs: Any) -> PreTrainedModel:
    """Merge the adapters into the model: peft's ``merge_and_unload``, with the masks of pruned weights kept.

    A training stage whose adapters were trained is completed by this call, and the recipe continues. How much of the
    adapters' update is outside the masks is logged, and noted on the record. A pruned checkpoint that was loaded
    without a recipe (also with ``optim_config="auto"``) has its masks from its record; merged and saved, it has none.

    Args:
        model: a ``PeftModel`` around an optimized model.
        kwargs: for ``merge_and_unload``: ``safe_merge``, ``adapter_names``, ``progressbar``.

    Returns:
        The model inside, without adapters; masked weights are exactly zero.

    Raises ``OptimError`` if adapters are on quantized layers, or if this is not a ``PeftModel`` of an optimized model.
    """
    merging: Any = getattr(model, "merge_and_unload", None)
    if merging is None:
        raise OptimError(f"merge_adapters takes a PeftModel around an optimized model, not a {type(model).__name__}")
    held = _masked(model)
    if isinstance(held, Run):
        require_sound(held)
    _refuse_quantized(held.model)
    if not isinstance(held, Run) and not held.masks:
        raise OptimError(
            f"merge_adapters keeps the zeros of an optimized model, and of this {type(held.model).__name__} none are "
            "known: it has no run, and no record of pruned weights beside its files. peft's merge_and_unload() merges "
            "it"
        )
    lost = _share_outside(held)
    layers = any(not hasattr(layer, "parameter_name") for layer in _masked_adapters(held).values())
    merging(**kwargs)
    apply_masks(held)
    if lost:
        sentence = f"merged adapters: {100 * lost:.1f} % of their update (squared) was outside the masks and is dropped"
        if isinstance(held, Run):
            held.record.note(sentence)
        log.warning("%s%s", sentence, "; train under the masks with hf_optim.training.keep_masks(model)" * layers)
    if isinstance(held, Run) and held.stage is not None and held.stage.trains and held.stage_entered:
        end_training(held)
    merged: PreTrainedModel = held.model
    return merged


def keep_masks(model: nn.Module) -> nn.Module:
    """Train the adapters of a pruned model under its masks: ``y = x (W + M ∘ s B A)ᵀ`` in place of ``x (W + s B A)ᵀ``.

    Call it on a ``PeftModel`` before training; ``merge_adapters`` is then exact up to rounding. It costs one dense
    product more for each masked layer with an adapter. An adapter trained this way belongs to its masks:
    ``save_pretrained`` saves it as usual, but load it onto the pruned model with ``keep_masks``, too. The masks are
    those of the model's run, or for a checkpoint that was loaded without a recipe those of its record.

    Returns the model. Raises ``OptimError`` if it has no masks, or adapters whose update is not one fixed matrix: other
    kinds than LoRA, its variants (DoRA), dropout inside, or adapters on stacked experts (``target_parameters``).
    """
    held = _masked(model)
    if not held.masks:
        raise OptimError("keep_masks takes a PeftModel around a model that hf_optim pruned; this one has no masks")
    training_watch.unwatch(held.model)
    for parameter, layer in _masked_adapters(held).items():
        name = parameter.removesuffix(".weight")
        if hasattr(layer, "parameter_name"):
            raise OptimError(
                f"{name}: an adapter on stacked experts (target_parameters) cannot be held under a mask, because peft "
                "adds its update inside of the forward. Train it without keep_masks: merge_adapters masks the sum, and "
                "says which share of the update it drops"
            )
        dropout = any(getattr(module, "p", 0.0) for module in getattr(layer, "lora_dropout", {}).values())
        if not hasattr(layer, "lora_A") or getattr(layer, "lora_variant", None) or dropout:
            raise OptimError(
                f"{name}: only a plain LoRA adapter without dropout can be held under a mask "
                "(LoraConfig(lora_dropout=0.0, use_dora=False))"
            )
        if not hasattr(layer, HOOK):
            setattr(layer, HOOK, layer.register_forward_hook(_under_mask(held, parameter)))
    return model


def _masked(model: nn.Module) -> Run | Pruned:
    """Return the run of a model, or the model inside of its adapters with the zeros that its checkpoint tells of."""
    if (run := find_run(model)) is not None:
        return run
    inside: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    return Pruned(inside, known_zeros(inside).masks)


def _under_mask(run: Masked, parameter: str) -> Callable[..., Tensor]:
    def hook(layer: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if layer.disable_adapters or layer.merged:
            return output
        outside = ~run.masks[parameter].to(output.device)
        transposed = not isinstance(layer.get_base_layer(), Conv1D)
        for adapter in layer.active_adapters:
            if adapter in layer.lora_A:
                stray = layer.get_delta_weight(adapter) * outside
                output = output - (args[0].to(stray.dtype) @ (stray.T if transposed else stray)).to(output.dtype)
        return output

    return hook


def _masked_adapters(run: Masked) -> dict[str, Any]:
    """The adapter layers around weights that have a mask, by the name of the parameter before it was wrapped."""
    found = {}
    for name, module in run.model.named_modules():
        if not hasattr(module, "base_layer"):
            continue
        while name.endswith(".base_layer"):  # one wrapper for each parameter of a module
            name = name.removesuffix(".base_layer")
        parameter = f"{name}.{getattr(module, 'parameter_name', 'weight')}"
        if parameter in run.masks:
            found[parameter] = module
    return found


@torch.no_grad()
def _share_outside(run: Masked) -> float:
    """The share of the adapters' update, by its square, that masks will remove; 0 if they learned under them."""
    total = outside = 0.0
    for parameter, layer in _masked_adapters(run).items():
        if not hasattr(layer, "get_delta_weight") or hasattr(layer, HOOK):
            continue
        for adapter in layer.active_adapters:
            if adapter in getattr(layer, "lora_A", {adapter}):
                square = layer.get_delta_weight(adapter).float().square()
                total += float(square.sum())
                outside += float(square.masked_fill(run.masks[parameter].to(square.device), 0.0).sum())
    return outside / total if total else 0.0


def _refuse_quantized(model: nn.Module) -> None:
    inside = [name.removesuffix(".base_layer") for name in quantized_modules(model) if name.endswith(".base_layer")]
    if inside:
        raise OptimError(
            f"{len(inside)} of the layers with adapters are quantized ({', '.join(inside[:3])}, ...): W + BA is not on "
            "their grid, and rounding it there again would undo much of what the adapter learned. Keep the adapter "
            "beside the model (save_pretrained, then PeftModel.from_pretrained); or load the float model, merge "
            "the adapter into that (merge_and_unload), and quantize the result with hf_optim.optimize"
        )
