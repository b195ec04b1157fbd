"""Losses of a model on calibration batches, with or without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import ModelError


def calibration_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss whose curvature measures the sensitivity of a model, on one batch; a scalar.

    With ``labels`` in the batch it is the model's loss; a causal language model without labels gets its ``input_ids``
    as labels. Otherwise the loss measures how far the outputs move from their current values: for logits
    ``KL(p₀ ‖ p)``, mean over positions; for other outputs ``½ ‖f - f₀‖²`` per row of the batch. Both losses and their
    gradients are zero at the current weights, and their Hessian is exactly the Gauss-Newton matrix ``Jᵀ A J`` (``A``
    is the Fisher matrix of the softmax, or the identity), so double backward computes it without approximation.
    """
    mask = batch.get("attention_mask")
    labels = batch.get("labels")
    if labels is None and is_causal_lm(model) and "input_ids" in batch:
        labels = batch["input_ids"]
        labels = labels if mask is None else labels.masked_fill(mask == 0, -100)
    if labels is not None:
        return model(**{**batch, "labels": labels}).loss
    output = model(**batch)
    logits = getattr(output, "logits", None)
    values = logits if isinstance(logits, Tensor) else _first_floating(output)
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    # A mask of another shape (an encoder's mask for the outputs of a decoder) does not apply to these positions.
    kept = values.new_ones(values.shape[:-1])
    if isinstance(mask, Tensor) and mask.shape == kept.shape:
        kept = mask.to(kept)
    if not isinstance(logits, Tensor):
        return 0.5 * ((values - values.detach()).square().sum(-1) * kept).sum() / values.shape[0]
    log_p = values.log_softmax(-1)
    fixed = log_p.detach()
    return ((fixed.exp() * (fixed - log_p)).sum(-1) * kept).sum() / kept.sum()


def ranking_loss(model: nn.Module, batch: Mapping[str, Any], label: str = "") -> Tensor:
    """Return the loss whose gradient ranks gates, mean over the predictions; a scalar.

    With labels in the batch, or for a causal language model, it is ``calibration_loss``. Otherwise it is ``-log p`` of
    the most probable class according to the model, at every position.

    Args:
        model: the model.
        batch: keyword arguments of its forward.
        label: the step, for the message.

    Raises ``ModelError`` for a model without labels that predicts no classes.
    """
    if "labels" in batch or is_causal_lm(model):
        return calibration_loss(model, batch)
    logits = getattr(model(**batch), "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[-1] < 2:
        raise ModelError(
            f"{label}: {type(model).__name__} predicts no classes, so it has no loss without labels; rank by activation"
        )
    chosen = logits.detach().argmax(-1)
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, -2), chosen.flatten(), reduction="none")
    mask = batch.get("attention_mask")
    # A mask of another shape (an encoder's mask for the outputs of a decoder) does not apply to these positions.
    kept = mask.flatten().to(loss) if isinstance(mask, Tensor) and mask.shape == chosen.shape else torch.ones_like(loss)
    return (loss * kept).sum() / kept.sum()


def is_causal_lm(model: nn.Module) -> bool:
    """Return True if the model is a causal language model of transformers, whose labels are its inputs."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _first_floating(output: Any) -> Tensor:
    values: Sequence[Any] = (
        [output] if isinstance(output, Tensor) else list(getattr(output, "values", lambda: output)())
    )
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
