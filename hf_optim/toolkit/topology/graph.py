"""The parts of a trace: numbered tensors (values), the operations on them, and the calls of modules."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Ref:
    """Replaces a recorded tensor in the arguments of an operation."""

    value: int


@dataclass(frozen=True, eq=False)
class Op:
    """One recorded operation.

    Attributes:
        position: its index in the trace.
        module: the qualified name of the module that runs it.
        reads, writes: the values that it reads and returns.
        function: the ATen overload; None for a linear layer, and for a tensor that changed because another tensor that
            shares its memory was written in place.
        args, kwargs: its arguments, with a ``Ref`` in place of each tensor.
        mutated: pairs of the values before and after an in-place write.
        linear: the qualified name of the linear layer; None for any other operation.
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
        """The values that the operation returns or writes in place; at least one."""
        return tuple(dict.fromkeys((*self.writes, *(after for _, after in self.mutated))))

    def __str__(self) -> str:
        operation = self.linear or getattr(self.function, "_opname", "alias").lstrip("_")
        return f"{self.module}: {operation}" if self.module else operation


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module: the values that it reads and writes, and the range [start, end) of its operations."""

    name: str
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    start: int
    end: int


@dataclass(frozen=True, eq=False)
class Trace:
    """The recorded forward of a model.

    Attributes:
        model: the model.
        modules: its modules by qualified name.
        ops: the operations, in execution order.
        calls: the calls of modules, in the order in which they began.
        shapes, dtypes: indexed by value.
        constants: the integer and boolean values whose elements are known.
        readers: value -> the operations that read it.
        outputs: the values that the model returns: the first one, and those that nothing in the model reads (a returned
            tensor that is read, such as the state of an encoder, is an intermediate).
        used_real_weights: True if the forward could not run on fake tensors.
        parameters: the values that are parameters of the model -> the qualified name of the parameter.
        partial: True if the forward failed, and what it did until then was recorded.
        cache: results about operations, so that the second of two equal blocks costs nothing (``memoize``).
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
    parameters: Mapping[int, str] = field(default_factory=dict)
    partial: bool = False
    cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    def calls_of(self, name: str) -> list[Call]:
        """Return the calls of the module ``name``, in order; empty if the forward did not reach it."""
        return [call for call in self.calls if call.name == name]


def iter_tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings (model outputs too), in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from iter_tensors(item)
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from iter_tensors(item)


def map_tree(tree: Any, change: Callable[[Any], Any]) -> Any:
    """Return the same nested lists, tuples and dicts, with every item replaced by ``change(item)``."""
    if isinstance(tree, dict):
        return {key: map_tree(item, change) for key, item in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(map_tree(item, change) for item in tree)
    return change(tree)
