"""Tensors by name in the state of a step, kept so that checkpoints save them."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from types import SimpleNamespace

from torch import Tensor


class NamedTensors(MutableMapping[str, Tensor]):
    """A mapping of tensors of one kind, such as the mask of every layer, in the state of a step.

    A checkpoint saves the attributes of a step's state that are tensors or plain JSON types, so each tensor is an
    attribute ``<kind>.<name>``. The mapping is a view: it holds nothing itself, and a tensor read from a checkpoint
    appears in it.

    Args:
        state: the state, ``run.state(step)``.
        kind: the word before the name, without a dot.
    """

    def __init__(self, state: SimpleNamespace, kind: str) -> None:
        self._attributes, self._prefix = vars(state), f"{kind}."

    def __getitem__(self, name: str) -> Tensor:
        return self._attributes[self._prefix + name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._attributes[self._prefix + name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._attributes[self._prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (key.removeprefix(self._prefix) for key in list(self._attributes) if key.startswith(self._prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
