"""Re-execute recorded operations in float64 on random numbers, to determine how they act on channels.

A trace records which operation reads which tensor; the operation itself shows what it does. Weights are not used: the
re-executed part ends at linear layers, and every other input (attention scores, masks, positions) is random. Results
hold for these random numbers, that is, with probability one. The numbers come from a separate generator with a fixed
seed.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .graph import Op, Ref, Trace, iter_tensors, map_tree

TOLERANCE = 1e-9
"""Largest relative difference between float64 numbers that count as equal."""


class NotReexecutable(Exception):
    """The operations cannot run outside their model."""


@dataclass(eq=False)
class Reexecution:
    """Runs ``ops`` in their recorded order.

    Inputs that are not given are drawn once, the same for every run. Integer inputs must be known, or are taken to be
    zero with ``guess_integers``.
    """

    trace: Trace
    ops: tuple[Op, ...]
    seed: int = 0
    guess_integers: bool = False
    inputs: dict[int, Tensor] = field(default_factory=dict)

    def run(self, given: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Run the operations on the values ``given``, and return all values. Raises ``NotReexecutable``."""
        values = dict(given)
        for op in sorted(self.ops, key=lambda op: op.position):
            self._run_op(op, values)
        return values

    def _run_op(self, op: Op, values: dict[int, Tensor]) -> None:
        if op.function is None:
            raise NotReexecutable(str(op))
        written = {before: self._look_up(before, values).clone() for before, _ in op.mutated}

        def concrete(item: object) -> object:
            if isinstance(item, Ref):
                return written[item.value] if item.value in written else self._look_up(item.value, values)
            if isinstance(item, torch.dtype):
                return torch.float64 if item.is_floating_point else item
            return torch.device("cpu") if isinstance(item, torch.device) else item

        args, kwargs = map_tree((op.args, dict(op.kwargs)), concrete)
        try:
            output = op.function(*args, **kwargs)
        except Exception as error:
            raise NotReexecutable(str(op)) from error
        values.update(zip(op.writes, iter_tensors(output), strict=True))
        values.update({after: written[before] for before, after in op.mutated})

    def _look_up(self, value: int, values: Mapping[int, Tensor]) -> Tensor:
        if value in values:
            return values[value]
        if value not in self.inputs:
            self.inputs[value] = self._draw(value)
        return self.inputs[value]

    def _draw(self, value: int) -> Tensor:
        if value in self.trace.constants:
            return self.trace.constants[value]
        dtype = self.trace.dtypes[value]
        if not (dtype.is_floating_point or dtype == torch.bool or self.guess_integers):
            raise NotReexecutable(f"integers of shape {tuple(self.trace.shapes[value])} are not known")
        return random_tensor(self.trace.shapes[value], dtype, self.seed + value)


def random_tensor(shape: Iterable[int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Return random float64 magnitudes in [0.5, 1.5) whose sign alternates from row to row.

    Both signs occur in each channel, so both sides of a ReLU are exercised. Booleans alternate along the last
    dimension, so that no row of a mask is empty. Integers are zero.
    """
    shape = tuple(shape)
    if dtype == torch.bool:
        return (torch.arange(shape[-1] if shape else 1) % 2 == 0).expand(shape or (1,)).reshape(shape).clone()
    if not dtype.is_floating_point:
        return torch.zeros(shape, dtype=dtype)
    numbers = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.5
    if len(shape) >= 2:
        numbers *= (1.0 - 2.0 * (torch.arange(shape[-2]) % 2)).to(torch.float64).unsqueeze(-1)
    return numbers


def distinct_factors(count: int, seed: int = 0) -> Tensor:
    """Return ``count`` distinct float64 factors between 0.5 and 2, evenly spaced, in random order."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return torch.linspace(0.5, 2.0, count, dtype=torch.float64)[order]


def is_close(left: Tensor, right: Tensor) -> bool:
    """Return True if two float64 tensors are equal up to rounding, relative to the largest entry of ``right``."""
    if left.shape != right.shape:
        return False
    scale = right.abs().max() if right.numel() else torch.tensor(1.0)
    return bool(torch.isfinite(scale)) and bool(((left - right).abs() <= TOLERANCE * scale).all())


def is_data_movement(trace: Trace, op: Op, value: int) -> bool:
    """Return True if ``op`` only moves, drops or repeats elements of ``value``: a view, slice, transpose or copy."""
    others = set(op.reads) - {value}
    if op.function is None or op.mutated or not others.issubset(trace.constants):
        return False
    key = ("data movement", ops_signature(trace, (op,), (value,)))
    return memoize(trace, key, lambda: _is_data_movement(trace, op, value))


def _is_data_movement(trace: Trace, op: Op, value: int) -> bool:
    before = random_tensor(trace.shapes[value])
    try:
        values = Reexecution(trace, (op,)).run({value: before})
    except NotReexecutable:
        return False
    outputs = [values[write] for write in op.writes]
    return all(output.is_floating_point() and bool(torch.isin(output, before).all()) for output in outputs)


def is_scale_equivariant(trace: Trace, op: Op, value: int) -> bool:
    """Return True if scaling the channels (last dimension) of ``value`` scales every output of ``op`` alike."""
    if op.function is None or op.mutated or not trace.shapes[value]:
        return False
    key = ("scale equivariant", ops_signature(trace, (op,), (value,)))
    return memoize(trace, key, lambda: _is_scale_equivariant(trace, op, value))


def _is_scale_equivariant(trace: Trace, op: Op, value: int) -> bool:
    channels = trace.shapes[value][-1]
    factors = distinct_factors(channels)
    before = random_tensor(trace.shapes[value])
    reexecution = Reexecution(trace, (op,), guess_integers=True)
    try:
        plain, scaled = reexecution.run({value: before}), reexecution.run({value: before * factors})
    except NotReexecutable:
        return False
    for write in op.writes:
        fits = plain[write].dim() > 0 and plain[write].shape[-1] == channels and plain[write].is_floating_point()
        if not fits or not is_close(scaled[write], plain[write] * factors):
            return False
    return True


def memoize(trace: Trace, key: Hashable, compute: Callable[[], Any]) -> Any:
    """Return ``compute()``, cached in the trace under ``key``."""
    if key not in trace.cache:
        trace.cache[key] = compute()
    return trace.cache[key]


def ops_signature(trace: Trace, ops: Iterable[Op], named: Iterable[int]) -> Hashable:
    """Return a key for what ``ops`` compute, regardless of the tensors they compute on: equal for two equal blocks.

    Values are numbered in order of appearance, those in ``named`` first, and are described by shape, dtype and, for
    constants, their elements.
    """
    numbers: dict[int, int] = {}
    described = [_describe(trace, numbers, [Ref(value) for value in named])]
    for op in sorted(ops, key=lambda op: op.position):
        parts = (op.args, op.kwargs, [Ref(value) for value in op.produces])
        described.append((op.function, *(_describe(trace, numbers, part) for part in parts)))
    return tuple(described)


def _describe(trace: Trace, numbers: dict[int, int], item: Any) -> Hashable:
    # Not a local function: one that calls itself would keep the trace, and so the model, until the garbage collector.
    if isinstance(item, Ref):
        number = numbers.setdefault(item.value, len(numbers))
        constant = trace.constants.get(item.value)
        elements = None if constant is None else tuple(constant.flatten().tolist())
        return number, trace.shapes[item.value], trace.dtypes[item.value], elements
    if isinstance(item, (list, tuple)):
        return tuple(_describe(trace, numbers, part) for part in item)
    if isinstance(item, Mapping):
        return tuple((key, _describe(trace, numbers, value)) for key, value in item.items())
    return type(item), str(item)
