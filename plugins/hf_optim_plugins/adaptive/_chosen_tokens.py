"""Some tokens of a batch, gathered into a smaller one.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache


class Chosen:
    """The tokens of a batch where a mask is True: rows without any are left out, and the others begin with theirs.

    Attributes:
        rows: int64 ``[R]``, of the batch.
        places: int64 ``[R, M]``: where the tokens are in their rows. M is the most that a row has; a row with fewer
            goes on with other tokens of it.
        real: bool ``[R, M]``, False for these others.
    """

    def __init__(self, mask: Tensor) -> None:
        """Find the tokens of ``mask``, bool ``[B, N]``, one of which is True. This waits for the device."""
        self.shape = mask.shape
        counts = mask.sum(1)
        self.rows = counts.nonzero()[:, 0]
        order = (~mask[self.rows]).to(torch.int8).argsort(dim=1, stable=True)
        self.places = order[:, : int(counts.max())]
        self.real = torch.arange(self.places.shape[1], device=mask.device) < counts[self.rows, None]

    def take(self, values: Tensor) -> Tensor:
        """Return ``[R, M, ...]`` of ``[1 or B, N, ...]``."""
        whole = values.expand(self.shape[0], *values.shape[1:])
        return whole[self.rows[:, None], self.places]

    def put(self, into: Tensor, values: Tensor) -> None:
        """Write ``[R, M, ...]`` into ``[B, N, ...]``, in place, without what is not real."""
        rows = self.rows[:, None].expand_as(self.places)[self.real]
        into[rows, self.places[self.real]] = values[self.real]

    def argument(self, value: Any) -> Any:
        """Return an argument of a layer for these tokens: parts by token, masks by query; caches are left out."""
        if isinstance(value, Cache):
            return None
        if isinstance(value, (tuple, list)):
            return type(value)(self.argument(each) for each in value)
        if not isinstance(value, Tensor) or value.dim() not in (2, 3, 4) or value.shape[0] not in (1, self.shape[0]):
            return value
        if value.dim() == 4:
            return self.mask(value) if value.shape[2] == self.shape[1] else value
        return self.take(value) if value.shape[1] == self.shape[1] else value

    def mask(self, value: Tensor) -> Tensor:
        """Return the rows of a mask ``[1 or B, 1 or H, N, S]`` for these queries, ``[R, 1 or H, M, S]``."""
        whole = value.expand(self.shape[0], *value.shape[1:]).transpose(1, 2)
        return whole[self.rows[:, None], self.places].transpose(1, 2)
