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
    passed on unchanged; a batch with packed images (``image_grid_thw``) is not split.
    """
    parts = []
    for batch in batches:
        size = batch_size(batch)
        step = rows if can_split(batch) else max(size, 1)
        for begin in range(0, size, step):
            parts.append(take_rows(batch, slice(begin, begin + step)))
    if len(parts) <= count:
        return parts
    return [parts[index * len(parts) // count] for index in range(count)]


def batch_size(batch: Mapping[str, Any]) -> int:
    """Return the number of rows of a batch: of its token ids, else of the longest tensor."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor) and value.dim()}
    main = next((tensors[key] for key in ("input_ids", "inputs_embeds") if key in tensors), None)
    return len(main) if main is not None else max(map(len, tensors.values()), default=0)


def can_split(batch: Mapping[str, Any]) -> bool:
    """Return True if rows can be taken from a batch: none of its inputs holds the patches of all rows together."""
    return not any(key.endswith("grid_thw") for key in batch)


def take_rows(batch: Mapping[str, Any], rows: slice) -> dict[str, Any]:
    """Return some rows of a batch; values that are not tensors with one entry per row are kept unchanged.

    ``position_ids`` with one plane per axis, ``[axes, rows, T]``, are cut along their second dimension.
    """
    size = batch_size(batch)

    def part(key: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim():
            return value
        if key == "position_ids" and value.dim() == 3 and value.shape[1] == size:
            return value[:, rows]
        return value[rows] if len(value) == size else value

    return {key: part(key, value) for key, value in batch.items()}
