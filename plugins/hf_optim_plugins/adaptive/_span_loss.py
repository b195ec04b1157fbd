"""The mean loss of a model over a few batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from hf_optim.toolkit.modules import eval_mode


def mean_loss(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> float | None:
    """Return the mean of the model's losses over batches with labels, in evaluation mode; None without any."""
    losses = []
    with eval_mode(model):
        for batch in batches:
            moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = model(**moved).get("loss") if "labels" in moved else None
            if loss is not None:
                losses.append(float(loss.mean()))
    return sum(losses) / len(losses) if losses else None
