"""Record the batches that a model is called with, and sample microbatches from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..topology import valid_rows


class RecordedBatches:
    """Context manager that records the keyword arguments of each call of a model, and the labels of its batch.

    ``with`` binds a list with one dictionary per call. Calibration gives the model no labels; those that belong to the
    batch are added as ``labels``, for a loss (``calibration_loss``, ``ranking_loss``).

    Args:
        model: the model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.found: list[dict[str, Any]] = []
        self._handle: Any = None

    def __enter__(self) -> list[dict[str, Any]]:
        self._handle = self.model.register_forward_pre_hook(self._keep, with_kwargs=True)
        return self.found

    def __exit__(self, *raised: object) -> None:
        self._handle.remove()

    def _keep(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        rows = valid_rows.current()
        batch = dict(kwargs)
        if rows is not None and rows.labels is not None:
            device = next((value.device for value in batch.values() if isinstance(value, Tensor)), None)
            batch["labels"] = rows.labels.to(device)
        self.found.append(batch)


def sample_microbatches(batches: Sequence[Mapping[str, Any]], count: int, rows: int) -> list[dict[str, Any]]:
    """Split batches into microbatches of at most ``rows`` rows, and return ``count`` of them, evenly spaced.

    Returns all microbatches if there are at most ``count``. Values that are not tensors with one entry per row are
    passed on unchanged.
    """
    parts = []
    for batch in batches:
        size = max((len(value) for value in batch.values() if isinstance(value, Tensor)), default=0)
        for begin in range(0, size, rows):
            parts.append({key: _rows(value, begin, rows, size) for key, value in batch.items()})
    if len(parts) <= count:
        return parts
    return [parts[index * len(parts) // count] for index in range(count)]


def _rows(value: Any, begin: int, rows: int, size: int) -> Any:
    return value[begin : begin + rows] if isinstance(value, Tensor) and value.dim() and len(value) == size else value
