"""What a trace is made of: numbered tensors, the operations on them, the calls of modules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """Stands for a recorded tensor in the arguments of an operation."""

    value: int


@dataclass(frozen=True, eq=False)
class Op:
    """One recorded operation.

    `function` is the ATen overload, or None for a linear layer (then `linear` is its name) and for a tensor
    that changed because another one, sharing its memory, was written in place.  `mutated` pairs the values
    before and after an in-place write.
    """

    position: int
    module: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    function: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    mutated: tuple[tuple[int, int], ...] = ()
    linear: str | None = None

    @property
    def produces(self) -> tuple[int, ...]:
        """The values that the operation returns or leaves behind in place; at least one."""
        return tuple(dict.fromkeys((*self.writes, *(after for _, after in self.mutated))))

    def __str__(self) -> str:
        operation = self.linear or getattr(self.function, "_opname", "alias").lstrip("_")
        return f"{self.module}: {operation}" if self.module else operation


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: the tensors that went in and came out, the operations [start, end) in between."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Trace:
    """The recorded forward of `model`.

    `shapes` and `dtypes` are indexed by value, `constants` are the integer and boolean tensors with known
    numbers, `readers[value]` are the operations that read it, `calls` are in the order in which they began.
    `outputs` are the values the model returns: the first one, and those that nothing in the model reads any
    more (a returned tensor which is read on, like an encoder's state, is an intermediate).  `used_real_weights` says that
    real weights had to be used.  `cache` keeps what was learned about operations, so that the second of two
    equal blocks costs nothing.
    """

    model: nn.Module
    modules: Mapping[str, nn.Module]
    ops: tuple[Op, ...]
    calls: tuple[Call, ...]
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    constants: Mapping[int, Tensor]
    readers: Mapping[int, tuple[Op, ...]]
    outputs: frozenset[int]
    used_real_weights: bool
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def calls_of(self, name: str) -> list[Call]:
        """The calls of the module `name`, in order; empty if the forward did not reach it."""
        return [call for call in self.calls if call.name == name]


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and mappings (model outputs too), in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from iter_tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from iter_tensors(item)


def map_tree(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested lists, tuples and dicts with `change(item)` for every item in them."""
    if isinstance(tree, dict):
        return {key: map_tree(item, change) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tree(item, change) for item in tree)
    return change(tree)
