"""The weight of every loss term of a batch in its optimizer step, so that the step does not depend on how it is cut.

A term that is a mean over ``n`` items of a batch gets the weight ``n / N``, ``N`` being the items of all batches of the
step: those that are accumulated and, with ``average_tokens_across_devices``, those of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..toolkit import compat

TASK = "task"
Key = tuple[int, str]  # position of the step in its stage, and name of a term
TASK_KEY: Key = (-1, TASK)
# Terms without items of their own: as the task, or 1 for each batch of a step without labels.
OTHER_KEY: Key = (-1, "other")
Counts = dict[Key, list[Any]]


def count_items(counted: Sequence[Mapping[str, Any]], task: Any, whole: bool = False) -> Counts:
    """Return the counts of one batch: those of each step's ``loss_items``, in their order, and that of the task.

    Counts that are functions are called, unless the batch is the ``whole`` step.
    """
    found: Counts = {TASK_KEY: [task], OTHER_KEY: [1]}
    for position, counts in enumerate(counted):
        for name, value in counts.items():
            if callable(value):
                value = 1 if whole else value()
            found[position, name] = list(value) if isinstance(value, (list, tuple)) else [value]
    return found


def step_weights(
    batches: Sequence[Counts], device: torch.device, gather: Callable[[Tensor], Tensor] | None, ranks: int
) -> list[dict[Key, Tensor]]:
    """Return the weights of the terms of each batch of an optimizer step.

    Args:
        batches: what ``count_items`` returned for each batch.
        device: where the loss is computed.
        gather: concatenates a tensor over ranks; None if every rank is normalized by itself.
        ranks: the number that gradients are averaged over afterwards, with ``gather``.

    Returns:
        For each batch, by term, float64 ``[parts]`` (float32 on MPS); zeros for a term without items in the step.
    """
    dtype = torch.float32 if device.type == "mps" else torch.float64
    vectors = torch.stack(
        [
            torch.stack([torch.as_tensor(n).detach().to(device, dtype) for counts in one.values() for n in counts])
            for one in batches
        ]
    )
    totals = vectors.sum(0)
    if gather is not None:
        totals = gather(totals[None]).sum(0) / ranks
    weights = torch.where(totals > 0, vectors / totals.where(totals > 0, 1.0), 0.0)
    sizes = [len(counts) for counts in batches[0].values()]
    found = [dict(zip(batches[0], row.split(sizes), strict=True)) for row in weights]
    for each in found:
        each[OTHER_KEY] = torch.where(totals[0] > 0, each[TASK_KEY], each[OTHER_KEY])
    return found


def weighted(term: Tensor, weight: Tensor) -> Tensor:
    """Return the sum of the parts of a term times their weights; a part of weight zero may be NaN (a mean of nothing).

    Args:
        term: a scalar, or ``[parts]``.
        weight: ``[1]``, or ``[parts]``.
    """
    return torch.where(weight != 0, term * weight.to(term.dtype), 0.0).sum()


def count_task_items(trainer: Any, inputs: Mapping[str, Any]) -> Any:
    """Return how many items the task loss of a batch is a mean over; 0 if it has no labels.

    Items are labels other than -100, without the first of a row where the loss shifts them, or whole rows: of a
    regression, of independent labels, of answers to questions and of transcripts.
    """
    model = trainer.run.model
    labels = inputs.get("shift_labels", inputs.get("labels"))
    if not isinstance(labels, Tensor):
        named = [inputs[name] for name in trainer.label_names if isinstance(inputs.get(name), Tensor)]
        return _count_answers(named[0], inputs) if named else _count_rows(inputs) if inputs.get("return_loss") else 0
    if type(model).__name__.endswith("ForCTC"):
        return len(labels)
    if labels.is_floating_point() or labels.dim() == 0:
        return _count_rows(inputs)
    if "shift_labels" not in inputs and compat.loss_shifts_labels(trainer):
        labels = labels[..., 1:]
    ignored = getattr(model.config, "semantic_loss_ignore_index", None)
    scored = labels.ne(-100)
    return (scored if ignored is None else scored & labels.ne(ignored)).sum()


def is_summed(model: Any) -> bool:
    """Return True if the task loss is a sum over rows: the sums of the parts of a batch add up without weights."""
    return type(model).__name__.endswith("ForCTC") and getattr(model.config, "ctc_loss_reduction", "") == "sum"


def _count_answers(positions: Tensor, inputs: Mapping[str, Any]) -> Any:
    """Return how many positions lie inside their text, since heads leave out the others."""
    tokens = inputs.get("input_ids")
    if positions.is_floating_point() or not isinstance(tokens, Tensor) or positions.dim() > 2:
        return len(positions)
    return positions.lt(tokens.shape[-1]).sum()


def _count_rows(inputs: Mapping[str, Any]) -> int:
    return len(next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim()), ()))
