"""Losses of a model on calibration batches, with or without labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ...errors import ModelError
from .row_tracking import BatchRows


def calibration_loss(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the loss whose curvature measures the sensitivity of a model, on one batch; a scalar.

    With ``labels`` in the batch it is the model's loss; a causal language model without labels gets its ``input_ids``
    as labels. Otherwise the loss measures how far the outputs move from their current values: for logits
    ``KL(p₀ ‖ p)``, mean over positions; for other outputs ``½ ‖f - f₀‖²`` per row of the batch. Both losses and their
    gradients are zero at the current weights, and their Hessian is exactly the Gauss-Newton matrix ``Jᵀ A J`` (``A``
    is the Fisher matrix of the softmax, or the identity), so double backward computes it without approximation.

    A batch in which nothing counts (padding alone, or labels of -100 alone) has a loss of zero without a gradient.
    """
    labels = labels_of(model, batch)
    if labels is not None:
        return _loss(model, batch, labels)
    output = model(**batch)
    logits = getattr(output, "logits", None)
    values = logits if isinstance(logits, Tensor) else _first_floating(output)
    values = values.float() if values.dtype in (torch.float16, torch.bfloat16) else values
    kept = counted_positions(model, batch, values)
    if not kept.any():
        return values.new_zeros(())
    if not isinstance(logits, Tensor):
        return 0.5 * ((values - values.detach()).square().sum(-1) * kept).sum() / _num_samples(kept)
    log_p = values.log_softmax(-1)
    fixed = log_p.detach()
    return ((fixed.exp() * (fixed - log_p)).sum(-1) * kept).sum() / kept.sum()


def labels_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor | None:
    """Return the labels of a batch; for a causal language model without any, its ``input_ids`` without padding.

    A token after padding is left out too: without padding it is the first of its text, which nothing predicts.
    """
    labels = batch.get("labels")
    if labels is not None or not is_causal_lm(model) or "input_ids" not in batch:
        return labels
    labels = batch["input_ids"]
    real = BatchRows(model).rows(batch).mask_of(model, labels[..., None])
    if real is None:
        return labels
    counted = real.clone()
    counted[:, 1:] &= real[:, :-1]
    counted[:, 0] = real[:, 0]
    return labels.masked_fill(~counted, -100)


def _loss(model: nn.Module, batch: Mapping[str, Any], labels: Tensor) -> Tensor:
    """Return the loss of the model with these labels; if none of them counts, zero without a gradient."""
    if labels.is_floating_point() or bool((labels != -100).any()):
        return model(**{**batch, "labels": labels}).loss
    return torch.zeros((), device=labels.device)


def count_samples(model: nn.Module, batch: Mapping[str, Any], size: int) -> int:
    """Return how many of ``size`` sequences of a batch are not all padding."""
    real = BatchRows(model).rows(batch).mask_of(model, torch.empty(size, 1))
    return size if real is None else int(real.sum())


def counted_positions(model: nn.Module, batch: Mapping[str, Any], outputs: Tensor) -> Tensor:
    """Return 1 for each position of the model's outputs ``[..., width]`` that counts and 0 for padding, their dtype."""
    mask = BatchRows(model).rows(batch).mask_of(model, outputs)
    return outputs.new_ones(outputs.shape[:-1]) if mask is None else mask.to(outputs.dtype)


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
    kept = counted_positions(model, batch, logits).flatten().to(loss)
    return (loss * kept).sum() / kept.sum() if kept.any() else loss.new_zeros(())


def is_causal_lm(model: nn.Module) -> bool:
    """Return True if the model is a causal language model of transformers, whose labels are its inputs."""
    return type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _num_samples(kept: Tensor) -> Tensor:
    """Return the number of rows of the batch with a position that counts."""
    return kept.flatten(1).any(1).sum() if kept.dim() > 1 else kept.sum()


def _first_floating(output: Any) -> Tensor:
    values: Sequence[Any] = (
        [output] if isinstance(output, Tensor) else list(getattr(output, "values", lambda: output)())
    )
    return next(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
