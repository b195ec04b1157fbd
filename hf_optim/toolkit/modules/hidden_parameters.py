"""Parameters that no state dict has: taken out of a layer while one is written or read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def hide_parameters(layer: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Take the parameters ``names``, those that are there, out of a layer for the length of a ``with`` block."""
    own = layer._parameters
    taken = {name: own.pop(name) for name in names if name in own}
    try:
        yield
    finally:
        own.update(taken)
