"""Hidden parameters: parameters to leave out of a state dict while it is saved or loaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def hide_parameters(layer: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Remove the parameters ``names`` from a layer for the duration of a ``with`` block; missing names are ignored."""
    own = layer._parameters
    hidden = {name: own.pop(name) for name in names if name in own}
    try:
        yield
    finally:
        own.update(hidden)
