"""What forwards in training computed with, found again where the backward computes them a second time.

Gradient checkpointing computes a layer again in the backward, maybe after other forwards, which drew other features or
moved centroids. It gives PyTorch's random generators the states of the first time, so that a number drawn in the layer
tells which forward it is.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class Recomputed:
    """Values of the last ``most`` forwards in training."""

    is_bookkeeping = True  # no forward depends on it, but the one that a backward repeats (``topology.trace_cache``)

    def __init__(self, most: int) -> None:
        self.most = most
        self._values: dict[int, Any] = {}

    def value(self, make: Callable[[], Any]) -> Any:
        """Return ``make()``, or in a backward what it was in the forward that is computed again.

        Raises ``ValueError`` in a backward if that forward is not among the last ones.
        """
        number = int(torch.randint(2**62, (), device="cpu"))
        if torch._C._current_graph_task_id() == -1:
            value = self._values[number] = make()
            while len(self._values) > self.most:
                del self._values[next(iter(self._values))]
            return value
        if number not in self._values:
            raise ValueError(
                "gradient checkpointing computes a forward again that this attention does not know: keep "
                f"preserve_rng_state, and call backward after at most {self.most} forwards"
            )
        return self._values[number]
