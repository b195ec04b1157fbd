"""A sample of what modules read, evenly spread over the calibration data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed import collectives
from ..topology import features
from .observers import InputObserver


class RowSample(InputObserver[Tensor]):
    """A sample of the rows (tokens) that linear layers read: name -> ``[n, in_features]``.

    The sample has between ``size`` and ``2 * size`` rows if there are that many: all rows are kept until there are more
    than ``2 * size``, then every second row, then every fourth, and so on. No random numbers are drawn.

    Args:
        modules: name -> linear layer.
        label: see ``InputObserver``.
        size: of each sample, or one for each name.
    """

    def __init__(self, modules: Mapping[str, nn.Module], label: str = "", size: int | Mapping[str, int] = 1) -> None:
        super().__init__(modules, label)
        self.sizes = dict(size) if isinstance(size, Mapping) else dict.fromkeys(self.modules, size)
        self._steps = dict.fromkeys(self.modules, 1)
        self._seen = dict.fromkeys(self.modules, 0)

    def width(self, name: str) -> int:
        """Return the number of columns of a sample."""
        return features(self.modules[name])[1]

    def update(self, name: str, inputs: Tensor) -> None:
        rows = inputs.detach().reshape(-1, inputs.shape[-1])
        first = -self._seen[name] % self._steps[name]
        self._seen[name] += len(rows)
        taken = rows[first :: self._steps[name]]
        self.check_finite(name, taken)
        kept = torch.cat([self.found[name], taken]) if name in self.found else taken.clone()
        while len(kept) > 2 * self.sizes[name]:
            kept = kept[::2].clone()
            self._steps[name] *= 2
        self.found[name] = kept

    def reduce(self) -> None:
        """Concatenate the samples of all ranks, and thin them out again."""
        for name, module in self.modules.items():
            mine = self.found.pop(name, None)
            lengths = torch.zeros(collectives.world_size(), dtype=torch.long)
            lengths[collectives.rank()] = 0 if mine is None else len(mine)
            begin = int(collectives.all_reduce_(lengths, "sum")[: collectives.rank()].sum())
            joined = torch.zeros(int(lengths.sum()), self.width(name), device=self.device)
            if mine is not None:
                joined[begin : begin + len(mine)] = mine.float()
            collectives.all_reduce_(joined, "sum")
            while len(joined) > 2 * self.sizes[name]:
                joined = joined[::2].clone()
            if len(joined):
                first: Any = next(module.parameters())
                self.found[name] = joined.to(first.dtype)
