"""Watch the logits of transformers' loop for NaN, without waiting for the device at each step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList


class WatchedLogits(LogitsProcessor):  # type: ignore[misc]
    """A processor that changes nothing, and notes the first step with NaN among the logits of any row."""

    def __init__(self) -> None:
        self._first: Tensor | None = None

    def before(self, processors: Any) -> LogitsProcessorList:
        """Return the processors behind this one."""
        return LogitsProcessorList([self, *processors])

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return ``scores [rows, V]`` as they are."""
        broken = torch.isnan(scores).any()
        tokens = torch.where(broken, input_ids.shape[1], torch.iinfo(torch.int64).max)
        self._first = tokens if self._first is None else torch.minimum(self._first, tokens)
        return scores

    def first_nan(self) -> int | None:
        """Return the number of tokens before the first step with NaN; None if there was none."""
        first = None if self._first is None else int(self._first)
        return None if first == torch.iinfo(torch.int64).max else first
