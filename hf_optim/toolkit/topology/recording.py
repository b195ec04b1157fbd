"""Record a forward: a dispatch mode that numbers the tensors and lists the operations on them."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from .graph import Call, Op, Ref, iter_tensors, map_tree
from .linear_layers import features, is_linear, is_plain_linear

VALUE_PRESERVING = ("lift_fresh", "lift_fresh_copy", "clone", "detach", "alias")
"""Operations whose result has the elements of their argument."""

NORMALIZING = {"topk", "sort", "argsort", "argmax", "max", "_softmax", "_log_softmax", "sigmoid"}
"""Operations on its own product by which a subclass of ``nn.Linear`` shows that it is more than a linear layer."""

LARGEST_CONSTANT = 1 << 16
"""Integer and boolean tensors whose elements are known are kept up to this number of elements."""


class Recorder(TorchDispatchMode):
    """Numbers the tensors of a forward and lists the operations on them.

    A tensor is identified by its id, so every tensor is kept alive until the end.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.calls: list[Call] = []
        self.kept: list[Tensor] = []
        self.numbers: dict[int, int] = {}
        self.constants: dict[int, Tensor] = {}
        self.by_storage: dict[int, list[Tensor]] = defaultdict(list)
        self.open_calls: list[tuple[str, tuple[int, ...], int]] = []
        self.inside_linear = False

    def watch(self, copied: nn.Module) -> None:
        """Hook the calls of every module of a copy that is discarded afterwards."""
        for name, module in copied.named_modules():
            # A subclass with a forward of its own may be more than a linear layer (a router): see ``_leave``.
            opaque = is_linear(module) and is_plain_linear(module)
            module.register_forward_pre_hook(self._enter(name, opaque), with_kwargs=True)
            module.register_forward_hook(self._leave(name, opaque))

    def _enter(self, name: str, linear: bool) -> Any:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.open_calls.append((name, tuple(map(self.value, iter_tensors((args, kwargs)))), len(self.ops)))
            self.inside_linear = self.inside_linear or linear

        return hook

    def _leave(self, name: str, opaque: bool) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            _, reads, start = self.open_calls.pop()
            writes = tuple(map(self.value, iter_tensors(output)))
            if opaque:
                self.inside_linear = False
            if opaque or (is_linear(module) and self._computes_linear(module, reads, writes, start)):
                self._forget(start)
                self.append(reads=reads, writes=writes, linear=name)
            self.calls.append(Call(name, reads, writes, start, len(self.ops)))

        return hook

    def _computes_linear(self, module: nn.Module, reads: tuple[int, ...], writes: tuple[int, ...], start: int) -> bool:
        """Return True if a call of a subclass of a linear layer returned one tensor, and only a product with it.

        A router that is a linear layer returns its choice too, or normalizes what it returns.
        """
        if len(writes) != 1 or self.kept[writes[0]].shape[-1:] != (features(module)[0],):
            return False
        derived = set(reads)
        for op in self.ops[start:]:
            if derived.intersection(op.reads):
                if getattr(op.function, "_opname", "") in NORMALIZING:
                    return False
                derived.update(op.produces)
        return True

    def _forget(self, start: int) -> None:
        """Remove the operations from ``start`` on; calls of modules among them become empty."""
        del self.ops[start:]
        self.calls = [
            Call(c.name, c.reads, c.writes, min(c.start, start), min(c.end, start)) if c.end > start else c
            for c in self.calls
        ]

    def value(self, tensor: Tensor) -> int:
        """Return the number of a tensor; a tensor that is not known yet gets a new number."""
        if id(tensor) not in self.numbers:
            self.renumber(tensor)
            with contextlib.suppress(RuntimeError, NotImplementedError):
                self.by_storage[tensor.untyped_storage()._cdata].append(tensor)
        return self.numbers[id(tensor)]

    def renumber(self, tensor: Tensor) -> int:
        """Give a tensor a new number, because it is new or was written in place, and return the number."""
        value = self.numbers[id(tensor)] = len(self.kept)
        self.kept.append(tensor)
        known = tensor.constant if isinstance(tensor, FakeTensor) else tensor
        if known is not None and not known.is_floating_point() and known.numel() <= LARGEST_CONSTANT:
            with _disable_current_modes():
                self.constants[value] = known.detach().to("cpu", copy=True)
        return value

    def append(self, **fields: Any) -> None:
        module = self.open_calls[-1][0] if self.open_calls else ""
        self.ops.append(Op(position=len(self.ops), module=module, **fields))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.inside_linear:
            return func(*args, **kwargs)
        reads = tuple(map(self.value, iter_tensors((args, kwargs)))) if _reads_data(func) else ()
        recorded = map_tree((tuple(args), dict(kwargs)), self._reference)
        output = func(*args, **kwargs)
        written = list(_written(func, args, kwargs))
        mutated = tuple((self.value(tensor), self.renumber(tensor)) for tensor in written)
        writes = tuple(map(self.value, iter_tensors(output)))
        if not writes and not mutated:
            return output
        if func._opname in VALUE_PRESERVING and reads[0] in self.constants:
            self.constants[writes[0]] = self.constants[reads[0]]
        self.append(reads=reads, writes=writes, function=func, args=recorded[0], kwargs=recorded[1], mutated=mutated)
        for tensor in written:
            self._renumber_aliases(tensor)
        return output

    def _reference(self, value: Any) -> Any:
        return Ref(self.value(value)) if isinstance(value, Tensor) else value

    def _renumber_aliases(self, written: Tensor) -> None:
        """Give new numbers to the tensors that share memory with one that was written in place."""
        with contextlib.suppress(RuntimeError, NotImplementedError):
            for other in self.by_storage[written.untyped_storage()._cdata]:
                if other is not written:
                    before = self.value(other)
                    self.append(reads=(before, self.value(written)), writes=(self.renumber(other),))


def _reads_data(func: Any) -> bool:
    """Return False if an operation uses only the shape and dtype of its argument (``zeros_like``, ``new_empty``)."""
    name = func._opname
    return not (name.startswith("new_") or name.endswith("_like"))


def _written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that an operation writes in place, according to its schema."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from iter_tensors(args[position] if position < len(args) else kwargs.get(argument.name))
