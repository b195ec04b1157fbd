"""Modules in the places of a feed-forward layer's projections, which is not one module in every architecture.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .thread_values import ThreadValue


class Inlet(nn.Module):
    """Takes the place of a projection of the input: keeps it for the layer's last module and returns ``[..., 0]``."""

    def __init__(self, keeps: bool) -> None:
        super().__init__()
        self.keeps = keeps
        self.kept = ThreadValue()

    def forward(self, x: Tensor) -> Tensor:
        if self.keeps:
            self.kept.leave(x)
        return x[..., :0]

    def take(self) -> Tensor:
        """Return what was kept, and release it. Raises ``RuntimeError`` if there is nothing."""
        x = self.kept.take()
        if x is None:
            raise RuntimeError("the feed-forward layer was called without its first projection")
        return x


def connect(layer: Any, inlet: Inlet) -> None:
    """Give the last module of a feed-forward layer its input, in its list ``inlet``: so it is not registered twice."""
    layer.inlet[:] = [inlet]
