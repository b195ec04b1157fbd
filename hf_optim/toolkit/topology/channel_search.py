"""Follow channels through a model: which values and parameters change with them when they are moved.

A ``Motion`` changes the channels of one value: it permutes, reflects or scales them. A value carries the channels along
dimension k if the operations that touch it, re-executed on random numbers moved along that dimension, give the same
results moved. The search goes from value to value, forwards and backwards, and ends at linear layers; a value that is
read but not computed is a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import product

import torch
from torch import Tensor, nn

from ...errors import ModelError
from .graph import Call, Op, Trace
from .reexecution import NotReexecutable, Reexecution, distinct_factors, is_close, memoize, ops_signature, random_tensor

Dims = dict[int, "int | None"]
"""For each value the dimension along which it carries the channels; None if it does not carry them. ``~k`` (a negative
number) stands for dimension k moved by the inverse."""


@dataclass(frozen=True)
class Motion:
    """A change of channels.

    Attributes:
        name: for the cache of the trace.
        move: ``move(tensor, dim)`` changes the channels of ``tensor`` along a dimension.
        inverse: the inverse of ``move``, if it is another function; values may then carry the inverse, too.
        depends: what an operation is said to depend on that does not commute with the motion.
        mixes: True if it mixes channels. A norm as a whole then commutes with it, though not operation by operation.
    """

    name: Hashable
    move: Callable[[Tensor, int], Tensor]
    inverse: Callable[[Tensor, int], Tensor] | None = None
    depends: str = "the order of its channels"
    mixes: bool = False

    def moved(self, tensor: Tensor, dim: int | None) -> Tensor:
        """Return ``tensor`` moved along ``dim``, an entry of ``Dims``."""
        if dim is None:
            return tensor
        if dim < 0:
            assert self.inverse is not None
            return self.inverse(tensor, ~dim)
        return self.move(tensor, dim)

    def dims(self, shape: torch.Size, width: int) -> tuple[int, ...]:
        """Return the entries of ``Dims`` that a value of this shape can have besides None."""
        along = tuple(dim for dim, size in enumerate(shape) if size == width)
        return along if self.inverse is None else (*along, *(~dim for dim in along))


def reordering(width: int) -> Motion:
    """Return a random permutation of the channels."""
    order = torch.randperm(width, generator=torch.Generator().manual_seed(11))
    return Motion(("order", width), lambda tensor, dim: tensor.index_select(dim, order))


def reflection(width: int, keeps_mean: bool) -> Motion:
    """Return a random reflection, an orthogonal map; with ``keeps_mean`` one that leaves the sum of the channels."""
    axis = torch.randn(width, dtype=torch.float64, generator=torch.Generator().manual_seed(12))
    if keeps_mean:
        axis = axis - axis.mean()
    axis = axis / axis.norm()

    def move(tensor: Tensor, dim: int) -> Tensor:
        last = tensor.movedim(dim, -1)
        return (last - 2 * (last @ axis).unsqueeze(-1) * axis).movedim(-1, dim)

    return Motion(("reflection", width, keeps_mean), move, depends="the basis of its channels", mixes=True)


def random_signs(shape: Iterable[int], seed: int) -> Tensor:
    """Return random signs: numbers of one sign in a row would hide a ReLU from a motion that mixes channels."""
    return torch.randint(0, 2, tuple(shape), generator=torch.Generator().manual_seed(seed)).double() * 2 - 1


def scaling(width: int) -> Motion:
    """Return a random positive factor for each channel; the weights that read the channel are divided by it."""
    factors = distinct_factors(width, seed=13)

    def along(tensor: Tensor, dim: int, by: Tensor) -> Tensor:
        return (tensor.movedim(dim, -1) * by).movedim(-1, dim)

    return Motion(
        ("scaling", width),
        lambda tensor, dim: along(tensor, dim, factors),
        lambda tensor, dim: along(tensor, dim, 1 / factors),
        depends="more than the direction of each channel",
    )


@dataclass
class ChannelSearch:
    """Follows channels from value to value, forwards and backwards.

    Attributes:
        trace: of the model.
        width: number of channels.
        motion: what is tried.
        norms: calls of norms, which are one operation each for a motion that mixes channels; others do not reach them.
        dims: what each value carries.
        parameters: name -> dimensions (as in ``Dims``) of the parameters that follow.
        readers, writers: linear layers that read or write the channels.
        norm_calls: norms whose input carries the channels.
    """

    trace: Trace
    width: int
    motion: Motion
    norms: tuple[Call, ...] = ()
    dims: Dims = field(default_factory=dict)
    parameters: dict[str, set[int]] = field(default_factory=dict)
    readers: dict[str, None] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)
    norm_calls: dict[str, None] = field(default_factory=dict)
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
        self.in_norm = {position: call for call in self.norms for position in range(call.start, call.end)}
        self.values = {name: value for value, name in self.trace.parameters.items()} if self.norms else {}

    def follow(self, start: int, dim: int | None = None) -> None:
        """Follow a value that carries the channels along ``dim``, by default its last one.

        Raises ``ModelError`` if an operation does not commute with the motion.
        """
        self._carry(start, len(self.trace.shapes[start]) - 1 if dim is None else dim)
        done: dict[int, Dims] = {}
        while self.pending:
            value = self.pending.pop()
            producer = self.producers.get(value)
            if producer is None:
                self._follow_parameter(value)
            for op in (*self.trace.readers.get(value, ()), *((producer,) if producer else ())):
                if op.position in self.in_norm:
                    self._follow_norm(self.in_norm[op.position], value)
                elif op.linear is not None:
                    self._follow_linear(op, value)
                elif done.get(op.position, {}).get(value) != self.dims[value]:
                    # Again, if what it read seemed not to carry the channels when it was reached from another value.
                    done[op.position] = self._follow_op(op)

    @property
    def carried(self) -> set[int]:
        """The values that carry the channels."""
        return {value for value, dim in self.dims.items() if dim is not None}

    def _carry(self, value: int, dim: int | None) -> None:
        if value in self.dims and self.dims[value] != dim:
            raise ModelError("the residual stream runs along two dimensions of one tensor")
        if value not in self.dims:
            self.dims[value] = dim
            if dim is not None:
                self.pending.append(value)

    def _follow_norm(self, call: Call, value: int) -> None:
        """Go through a norm as a whole, or stop behind it."""
        if self.motion.mixes:
            if value in call.reads or value in call.writes:
                self.norm_calls[call.name] = None
                for other in (*call.reads, *call.writes):
                    self._carry(other, len(self.trace.shapes[other]) - 1)
        elif value not in call.writes:
            raise ModelError(f"another norm ({call.name}) reads it")

    def _follow_op(self, op: Op) -> Dims:
        """Determine how the channels run through one operation, return it, and continue from there."""
        if op.function is None:
            raise ModelError(f"the residual stream is written in place at {op}")
        known = {value: self.dims[value] for value in (*op.reads, *op.produces) if value in self.dims}
        key = (self.motion.name, ops_signature(self.trace, (op,), known), tuple(known.values()))
        values = tuple(dict.fromkeys((*op.reads, *op.produces)))
        found = memoize(self.trace, key, lambda: self._solve(op, known, values))
        if found is None:
            raise ModelError(f"what {op} does to the residual stream depends on {self.motion.depends}")
        for value, dim in zip(values, found, strict=True):
            if dim is not None or value in op.produces:
                self._carry(value, dim)
        return dict(zip(values, found, strict=True))

    def _solve(self, op: Op, known: Dims, values: tuple[int, ...]) -> tuple[int | None, ...] | None:
        """Return what each of ``values`` carries, all that the operation reads and writes; None if nothing fits."""
        if getattr(op.function, "_opname", "") == "embedding":
            # Known, and too large to re-execute: the last dimension of the table and of the rows looked up in it.
            inverse = any(dim is not None and dim < 0 for dim in known.values())
            last = {v: len(self.trace.shapes[v]) - 1 for v in (op.reads[0], *op.writes)}
            return tuple((~last[v] if inverse else last[v]) if v in last else None for v in values)
        reads = tuple(dict.fromkeys(op.reads))
        reexecution = Reexecution(self.trace, (op,), guess_integers=True)
        inputs = {value: self._numbers(value) for value in reads if self.trace.dtypes[value].is_floating_point}
        choices = [(known[value],) if value in known else self._candidates(value) for value in inputs]
        try:
            before = reexecution.run(inputs)
            for choice in product(*choices):
                moved = {v: self.motion.moved(x, dim) for (v, x), dim in zip(inputs.items(), choice, strict=True)}
                after = reexecution.run(moved)
                outputs = [self._fit(before[v], after[v], known.get(v, _ANY)) for v in op.produces]
                if _ANY not in outputs:
                    found = {**dict(zip(inputs, choice, strict=True)), **dict(zip(op.produces, outputs, strict=True))}
                    return tuple(found.get(value) for value in values)  # type: ignore[misc]
        except NotReexecutable:
            return None
        return None

    def _candidates(self, value: int) -> tuple[int | None, ...]:
        return (None, *self.motion.dims(self.trace.shapes[value], self.width))

    def _fit(self, before: Tensor, after: Tensor, expected: object) -> object:
        """Return what ``after`` carries, which is ``before`` moved: an entry of ``Dims``.

        Returns ``_ANY`` if nothing fits (only ``expected`` is tried, unless it is ``_ANY``).
        """
        for dim in (None, *self.motion.dims(before.shape, self.width)) if expected is _ANY else (expected,):
            if is_close(after.double(), self.motion.moved(before, dim).double()):  # type: ignore[arg-type]
                return dim
        return _ANY

    def _numbers(self, value: int) -> Tensor:
        if value in self.trace.constants:
            return self.trace.constants[value]
        drawn = random_tensor(self.trace.shapes[value], self.trace.dtypes[value], seed=13 + value)
        return drawn * random_signs(drawn.shape, seed=value) if self.motion.mixes else drawn

    def _follow_linear(self, op: Op, value: int) -> None:
        assert op.linear is not None
        if self.dims[value] not in {len(self.trace.shapes[value]) - 1, ~(len(self.trace.shapes[value]) - 1)}:
            raise ModelError(f"{op.linear} mixes the tokens of the residual stream")
        inverse = self.dims[value] < 0  # type: ignore[operator]
        module = self.trace.modules[op.linear]
        rows = 0 if isinstance(module, nn.Linear) else 1
        if value in op.reads:
            self.readers[op.linear] = None
            # The weight that reads scaled channels is scaled by the inverse; orthogonal maps are the same for both.
            opposite = self.motion.inverse is not None and not inverse
            self._add_parameter(module.get_parameter("weight"), ~(1 - rows) if opposite else 1 - rows)
        if value in op.produces:
            self.writers[op.linear] = None
            self._add_parameter(module.get_parameter("weight"), ~rows if inverse else rows)
            if module.bias is not None:
                self._add_parameter(module.get_parameter("bias"), ~0 if inverse else 0)

    def _follow_parameter(self, value: int) -> None:
        """Add the parameters that a value without a producer can be: those of its shape in the module that reads it."""
        dim, shape = self.dims[value], self.trace.shapes[value]
        assert dim is not None
        if value in self.trace.parameters and self.norms:
            held = [self.trace.model.get_parameter(self.trace.parameters[value])]
        else:
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
        if self.names[id(parameter)] in self.values:
            self._carry(self.values[self.names[id(parameter)]], dim)
        # A tied weight: the head of a masked language model shares the embedding's weight, but reads another stream.
        for op in self.linears.get(id(parameter), ()):
            assert op.linear is not None
            along = dim if dim >= 0 else ~dim
            reads = along == (1 if isinstance(self.trace.modules[op.linear], nn.Linear) else 0)
            value = op.reads[0] if reads else op.writes[0]
            last = len(self.trace.shapes[value]) - 1
            opposite = self.motion.inverse is not None and (dim >= 0 if reads else dim < 0)
            self._carry(value, ~last if opposite else last)


_ANY = object()
