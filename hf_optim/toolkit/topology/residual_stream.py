"""The residual stream of a transformer: every tensor that reads or writes it.

The channels of the residual stream can be permuted if everything that touches them follows: the columns of the
embeddings, gains and biases of the norms, the columns of the linear layers that read the stream, the rows and biases of
those that write it. For a permutation matrix P and each of these in turn::

    E -> E P,    g -> P^T g,    W_read -> W_read P,    W_write -> P^T W_write

The stream is followed on a trace of the model: a value carries it along dimension k if the operations that touch the
value, re-executed on random numbers permuted along that dimension, give the same results permuted. The search ends at
linear layers; a value that is read but not computed is a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from .block_lists import blocks
from .graph import Op, Trace
from .reexecution import NotReexecutable, Reexecution, is_close, memoize, ops_signature, random_tensor
from .tracing import trace

Dims = dict[int, "int | None"]
"""For each value the dimension along which it carries the stream; None if it does not carry it."""


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a model.

    Attributes:
        width: number of channels.
        readers: names of the linear layers whose input it is.
        writers: names of the linear layers whose output is added to it.
        norms: names of the modules that normalise it.
        parameters: name (one of them, if tied) -> the dimensions of the parameter that follow the order of the stream.
        returned: True if the model returns the stream, as an encoder without a head does; its order is then fixed.
    """

    width: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    returned: bool


def find_residual_stream(source: PreTrainedModel | Trace) -> ResidualStream:
    """Return the residual stream that runs through the blocks of a model.

    Raises ``ModelError`` if the model has no blocks, or if an operation on the stream other than a linear layer depends
    on the order of its channels.
    """
    traced = source if isinstance(source, Trace) else trace(source)
    found = blocks(traced)
    if not found:
        raise ModelError(f"{type(traced.model).__name__} has no sequence of blocks, so no residual stream is known")
    start = next(value for value in traced.calls_of(found[0].name)[0].reads if traced.dtypes[value].is_floating_point)
    search = _Search(traced, traced.shapes[start][-1])
    search.follow(start)
    return search.residual()


@dataclass
class _Search:
    """Follows the stream from value to value, forwards and backwards."""

    trace: Trace
    width: int
    dims: Dims = field(default_factory=dict)
    parameters: dict[str, set[int]] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)
    pending: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.producers = {value: op for op in self.trace.ops for value in op.produces}
        self.names: dict[int, str] = {}
        for name, parameter in self.trace.model.named_parameters():
            self.names[id(parameter)] = name
        self.linears: dict[int, list[Op]] = {}
        for op in self.trace.ops:
            if op.linear is not None:
                weight = self.trace.modules[op.linear].get_parameter("weight")
                self.linears.setdefault(id(weight), []).append(op)

    def follow(self, start: int) -> None:
        self._carry(start, len(self.trace.shapes[start]) - 1)
        done: dict[int, Dims] = {}
        while self.pending:
            value = self.pending.pop()
            producer = self.producers.get(value)
            if producer is None:
                self._follow_parameter(value)
            for op in (*self.trace.readers.get(value, ()), *((producer,) if producer else ())):
                if op.linear is not None:
                    self._follow_linear(op, value)
                elif done.get(op.position, {}).get(value) != self.dims[value]:
                    # Again, if what it read seemed not to carry the stream when it was reached from another value.
                    done[op.position] = self._follow_op(op)

    def residual(self) -> ResidualStream:
        carried = {value for value, dim in self.dims.items() if dim is not None}
        parameters = {name: tuple(sorted(dims)) for name, dims in self.parameters.items()}
        calls = {call.name for call in self.trace.calls if carried.intersection(call.reads)}
        norms = [
            name
            for name in dict.fromkeys(call.name for call in self.trace.calls)
            if name in calls and parameters.get(f"{name}.weight") == (0,) and self._is_vector(f"{name}.weight")
        ]
        return ResidualStream(
            self.width,
            tuple(self.readers),
            tuple(self.writers),
            tuple(norms),
            parameters,
            bool(carried & self.trace.outputs),
        )

    def _is_vector(self, name: str) -> bool:
        return self.trace.model.get_parameter(name).dim() == 1

    def _carry(self, value: int, dim: int | None) -> None:
        if value in self.dims and self.dims[value] != dim:
            raise ModelError("the residual stream runs along two dimensions of one tensor")
        if value not in self.dims:
            self.dims[value] = dim
            if dim is not None:
                self.pending.append(value)

    def _follow_op(self, op: Op) -> Dims:
        """Determine how the stream runs through one operation, return it, and continue from there."""
        if op.function is None:
            raise ModelError(f"the residual stream is written in place at {op}")
        known = {value: self.dims[value] for value in (*op.reads, *op.produces) if value in self.dims}
        key = ("stream", ops_signature(self.trace, (op,), known), tuple(known.values()), self.width)
        values = tuple(dict.fromkeys((*op.reads, *op.produces)))
        found = memoize(self.trace, key, lambda: self._solve(op, known, values))
        if found is None:
            raise ModelError(f"what {op} does to the residual stream depends on the order of its channels")
        for value, dim in zip(values, found, strict=True):
            if dim is not None or value in op.produces:
                self._carry(value, dim)
        return dict(zip(values, found, strict=True))

    def _solve(self, op: Op, known: Dims, values: tuple[int, ...]) -> tuple[int | None, ...] | None:
        """Return the dimension of the stream in each of ``values``, all that the operation reads and writes.

        Returns None if no choice of dimensions fits.
        """
        if getattr(op.function, "_opname", "") == "embedding":
            # Known, and too large to re-execute: the last dimension of the table and of the rows looked up in it.
            return tuple(len(self.trace.shapes[v]) - 1 if v in (op.reads[0], *op.writes) else None for v in values)
        reads = tuple(dict.fromkeys(op.reads))
        order = torch.randperm(self.width, generator=torch.Generator().manual_seed(11))
        reexecution = Reexecution(self.trace, (op,), guess_integers=True)
        inputs = {value: _numbers(self.trace, value) for value in reads if self.trace.dtypes[value].is_floating_point}
        choices = [(known[value],) if value in known else self._candidates(value) for value in inputs]
        try:
            before = reexecution.run(inputs)
            for choice in product(*choices):
                moved = {v: _permuted(x, dim, order) for (v, x), dim in zip(inputs.items(), choice, strict=True)}
                after = reexecution.run(moved)
                outputs = [self._fit(before[v], after[v], order, known.get(v, _ANY)) for v in op.produces]
                if _ANY not in outputs:
                    found = {**dict(zip(inputs, choice, strict=True)), **dict(zip(op.produces, outputs, strict=True))}
                    return tuple(found.get(value) for value in values)  # type: ignore[misc]
        except NotReexecutable:
            return None
        return None

    def _candidates(self, value: int) -> tuple[int | None, ...]:
        return (None, *(dim for dim, size in enumerate(self.trace.shapes[value]) if size == self.width))

    def _fit(self, before: Tensor, after: Tensor, order: Tensor, expected: object) -> object:
        """Return the dimension along which ``after`` is ``before`` permuted.

        Returns None if the two are equal, and ``_ANY`` if no dimension fits (only ``expected`` is tried, unless it is
        ``_ANY``).
        """
        dims = (None, *(dim for dim, size in enumerate(before.shape) if size == self.width))
        for dim in dims if expected is _ANY else (expected,):
            if is_close(after.double(), _permuted(before, dim, order).double()):  # type: ignore[arg-type]
                return dim
        return _ANY

    def _follow_linear(self, op: Op, value: int) -> None:
        assert op.linear is not None
        if self.dims[value] != len(self.trace.shapes[value]) - 1:
            raise ModelError(f"{op.linear} mixes the tokens of the residual stream")
        module = self.trace.modules[op.linear]
        rows = 0 if isinstance(module, nn.Linear) else 1
        if value in op.reads:
            self.readers[op.linear] = None
            self._add_parameter(module.get_parameter("weight"), 1 - rows)
        if value in op.produces:
            self.writers[op.linear] = None
            self._add_parameter(module.get_parameter("weight"), rows)
            if module.bias is not None:
                self._add_parameter(module.get_parameter("bias"), 0)

    def _follow_parameter(self, value: int) -> None:
        """Add the parameters that a value without a producer can be: those of its shape in the module that reads it."""
        dim, shape = self.dims[value], self.trace.shapes[value]
        assert dim is not None
        held = [p for op in self.trace.readers[value] for p in self._parameters_of(op.module) if p.shape == shape]
        if not held:
            raise ModelError(f"the residual stream begins in a tensor {tuple(shape)} that is not a parameter")
        for parameter in held:
            self._add_parameter(parameter, dim)

    def _parameters_of(self, module: str) -> Iterator[nn.Parameter]:
        yield from self.trace.modules[module].parameters(recurse=False)

    def _add_parameter(self, parameter: nn.Parameter, dim: int) -> None:
        dims = self.parameters.setdefault(self.names[id(parameter)], set())
        if dim in dims:
            return
        dims.add(dim)
        # A tied weight: the head of a masked language model shares the embedding's weight, but reads another stream.
        for op in self.linears.get(id(parameter), ()):
            assert op.linear is not None
            reads = dim == (1 if isinstance(self.trace.modules[op.linear], nn.Linear) else 0)
            value = op.reads[0] if reads else op.writes[0]
            self._carry(value, len(self.trace.shapes[value]) - 1)


_ANY = object()


def _permuted(tensor: Tensor, dim: int | None, order: Tensor) -> Tensor:
    return tensor if dim is None else tensor.index_select(dim, order)


def _numbers(trace: Trace, value: int) -> Tensor:
    known: Mapping[int, Tensor] = trace.constants
    return known[value] if value in known else random_tensor(trace.shapes[value], trace.dtypes[value], seed=13 + value)
