"""The residual stream of a transformer: every tensor that reads or writes it, and a new order of its channels.

The channels of the residual stream may stand in any order, if everything that touches them agrees: the columns of the
embeddings, gains and biases of the norms, the columns of the linears that read the stream, the rows and biases of those
that write it. For a permutation matrix P and each of these in turn::

    E -> E P,    g -> P^T g,    W_read -> W_read P,    W_write -> P^T W_write

Where the stream goes is found on a trace of the model: a value carries it along a dimension k if the operations that
touch it, run again on random numbers with that dimension permuted, give the same results permuted. Linear layers end
the search; what is read and is no linear layer's output is a parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ...errors import ModelError
from ..modules.transplant import rounding_tolerance
from .block_lists import blocks
from .fake_inputs import dummy_inputs
from .graph import Op, Trace, iter_tensors
from .reexecution import NotReexecutable, Reexecution, is_close, memoize, ops_signature, random_tensor
from .tracing import trace

Dims = dict[int, "int | None"]
"""For each value the dimension along which it carries the stream; None where it does not."""


@dataclass(frozen=True, eq=False)
class ResidualStream:
    """The residual stream of a model.

    Attributes:
        width: its channels.
        readers: names of the linears whose input it is.
        writers: names of the linears whose output goes into it.
        norms: names of the modules that normalise it.
        parameters: the dimensions of each parameter (by one of its names) that are in its order.
        returned: whether the model gives it out, as an encoder without a head does: then its order is fixed.
    """

    width: int
    readers: tuple[str, ...]
    writers: tuple[str, ...]
    norms: tuple[str, ...]
    parameters: dict[str, tuple[int, ...]]
    returned: bool


def find_residual_stream(source: PreTrainedModel | Trace) -> ResidualStream:
    """The residual stream that runs through the blocks of a model.

    Raises ``ModelError`` where there are no blocks, or where something is done to the stream that depends on the order
    of its channels and is no linear layer.
    """
    traced = source if isinstance(source, Trace) else trace(source)
    found = blocks(traced)
    if not found:
        raise ModelError(f"{type(traced.model).__name__} has no sequence of blocks, so no residual stream is known")
    start = next(value for value in traced.calls_of(found[0].name)[0].reads if traced.dtypes[value].is_floating_point)
    search = _Search(traced, traced.shapes[start][-1])
    search.follow(start)
    return search.residual()


@torch.no_grad()
def permute_residual_(model: PreTrainedModel, order: Tensor, residual: ResidualStream | None = None) -> ResidualStream:
    """Channel ``c`` of the residual stream becomes what channel ``order[c]`` was, in place; outputs stay as they are.

    Args:
        model: a transformer whose blocks hand on a residual stream.
        order: ``[width]`` int64, a permutation.
        residual: what ``find_residual_stream`` found, if that is known.

    The outputs on dummy inputs are compared before and after. Raises ``ValueError`` for an order that is no permutation
    of the stream's channels, and ``ModelError``, with the model as it was, for a model that returns the stream or whose
    outputs change by more than rounding.
    """
    residual = residual or find_residual_stream(model)
    if not torch.equal(order.sort().values.cpu(), torch.arange(residual.width)):
        raise ValueError(f"no permutation of {residual.width} channels")
    if residual.returned:
        raise ModelError(
            f"{type(model).__name__} returns its residual stream: another order of the channels would show"
        )
    inputs = dummy_inputs(model)
    before = _output(model, inputs)
    _reorder_(model, residual, order)
    gap = float((_output(model, inputs) - before).abs().max() / before.abs().max().clamp_min(1e-30))
    if not gap <= rounding_tolerance(model):
        _reorder_(model, residual, order.argsort())
        raise ModelError(
            f"permuting the residual stream of {type(model).__name__} changes its outputs by {gap:.1e} of the largest"
        )
    return residual


def _output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        outputs = model(**inputs)
    finally:
        for module, mode in modes:
            module.training = mode
    return next(iter_tensors(outputs)).double()


def _reorder_(model: nn.Module, residual: ResidualStream, order: Tensor) -> None:
    for name, dims in residual.parameters.items():
        parameter = model.get_parameter(name)
        moved = parameter.detach()
        for dim in dims:
            moved = moved.index_select(dim, order.to(moved.device))
        parameter.copy_(moved)


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
        self.makers = {value: op for op in self.trace.ops for value in op.produces}
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
        done: set[int] = set()
        while self.pending:
            value = self.pending.pop()
            maker = self.makers.get(value)
            if maker is None:
                self._source(value)
            for op in (*self.trace.readers.get(value, ()), *((maker,) if maker else ())):
                if op.linear is not None:
                    self._linear(op, value)
                elif op.position not in done:
                    done.add(op.position)
                    self._settle(op)

    def residual(self) -> ResidualStream:
        carried = {value for value, dim in self.dims.items() if dim is not None}
        kept = {name: tuple(sorted(dims)) for name, dims in self.parameters.items()}
        calls = {call.name for call in self.trace.calls if carried.intersection(call.reads)}
        norms = [
            name
            for name in dict.fromkeys(call.name for call in self.trace.calls)
            if name in calls and kept.get(f"{name}.weight") == (0,) and self._is_vector(f"{name}.weight")
        ]
        return ResidualStream(
            self.width,
            tuple(self.readers),
            tuple(self.writers),
            tuple(norms),
            kept,
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

    def _settle(self, op: Op) -> None:
        """Find out how the stream runs through one operation, and carry it on."""
        if op.function is None:
            raise ModelError(f"the residual stream is written in place at {op}")
        known = {value: self.dims[value] for value in (*op.reads, *op.produces) if value in self.dims}
        question = ("stream", ops_signature(self.trace, (op,), known), tuple(known.values()), self.width)
        values = tuple(dict.fromkeys((*op.reads, *op.produces)))
        answer = memoize(self.trace, question, lambda: self._solve(op, known, values))
        if answer is None:
            raise ModelError(f"what {op} does to the residual stream depends on the order of its channels")
        for value, dim in zip(values, answer, strict=True):
            if dim is not None or value in op.produces:
                self._carry(value, dim)

    def _solve(self, op: Op, known: Dims, values: tuple[int, ...]) -> tuple[int | None, ...] | None:
        """The dimension of the stream in each of ``values``, all that the operation reads and writes; None if none."""
        if getattr(op.function, "_opname", "") == "embedding":
            # Known, and too large to be run again: the last dimension of the table and of what is read from it.
            return tuple(len(self.trace.shapes[v]) - 1 if v in (op.reads[0], *op.writes) else None for v in values)
        reads = tuple(dict.fromkeys(op.reads))
        order = torch.randperm(self.width, generator=torch.Generator().manual_seed(11))
        replay = Reexecution(self.trace, (op,), guess_integers=True)
        inputs = {value: _numbers(self.trace, value) for value in reads if self.trace.dtypes[value].is_floating_point}
        choices = [(known[value],) if value in known else self._candidates(value) for value in inputs]
        try:
            before = replay.run(inputs)
            for choice in product(*choices):
                moved = {v: _permuted(x, dim, order) for (v, x), dim in zip(inputs.items(), choice, strict=True)}
                after = replay.run(moved)
                outputs = [self._fit(before[v], after[v], order, known.get(v, _ANY)) for v in op.produces]
                if _ANY not in outputs:
                    found = {**dict(zip(inputs, choice, strict=True)), **dict(zip(op.produces, outputs, strict=True))}
                    return tuple(found.get(value) for value in values)  # type: ignore[misc]
        except NotReexecutable:
            return None
        return None

    def _candidates(self, value: int) -> tuple[int | None, ...]:
        return (None, *(dim for dim, size in enumerate(self.trace.shapes[value]) if size == self.width))

    def _fit(self, before: Tensor, after: Tensor, order: Tensor, asked: object) -> object:
        """The dimension along which ``after`` is ``before`` permuted (None: it is the same), or ``_ANY`` if neither."""
        dims = (None, *(dim for dim, size in enumerate(before.shape) if size == self.width))
        for dim in dims if asked is _ANY else (asked,):
            if is_close(after.double(), _permuted(before, dim, order).double()):  # type: ignore[arg-type]
                return dim
        return _ANY

    def _linear(self, op: Op, value: int) -> None:
        assert op.linear is not None
        if self.dims[value] != len(self.trace.shapes[value]) - 1:
            raise ModelError(f"{op.linear} mixes the tokens of the residual stream")
        module = self.trace.modules[op.linear]
        rows = 0 if isinstance(module, nn.Linear) else 1
        if value in op.reads:
            self.readers[op.linear] = None
            self._hold(module.get_parameter("weight"), 1 - rows)
        if value in op.produces:
            self.writers[op.linear] = None
            self._hold(module.get_parameter("weight"), rows)
            if module.bias is not None:
                self._hold(module.get_parameter("bias"), 0)

    def _source(self, value: int) -> None:
        """A value that no operation made: the parameters of that shape of the module that reads it."""
        dim, shape = self.dims[value], self.trace.shapes[value]
        assert dim is not None
        held = [p for op in self.trace.readers[value] for p in self._parameters_of(op.module) if p.shape == shape]
        if not held:
            raise ModelError(f"the residual stream begins in a tensor {tuple(shape)} that is no parameter")
        for parameter in held:
            self._hold(parameter, dim)

    def _parameters_of(self, module: str) -> Iterator[nn.Parameter]:
        yield from self.trace.modules[module].parameters(recurse=False)

    def _hold(self, parameter: nn.Parameter, dim: int) -> None:
        held = self.parameters.setdefault(self.names[id(parameter)], set())
        if dim in held:
            return
        held.add(dim)
        # A tied weight: the head of a masked language model has the embedding's, and reads a stream of its own.
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
