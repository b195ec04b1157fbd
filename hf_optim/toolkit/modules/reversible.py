"""Reversible residual blocks: activations are computed again in the backward, from the outputs, and not stored.

    y1 = x1 + f(x2),   y2 = x2 + g(y1)          x2 = y2 - g(y1),   x1 = y1 - f(x2)

Gomez et al., "The Reversible Residual Network", arXiv 1707.04585; used so by Reformer (2001.04451, section 3). The
memory of activations is that of one step, whatever the number of steps; the backward computes f and g once more. What
the inverse restores is exact up to rounding, so in half precision errors grow with the number of steps.

    streams = Streams.of(x)
    for f, g in steps:
        streams = reversible_step(streams, f, g, f_parameters, g_parameters)
    y = streams.mean()

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Branch = Callable[[Tensor], Tensor]
T = TypeVar("T")


class Chain:
    """What the steps of one forward share: the outputs of the last step, from which the backward begins.

    Attributes:
        outputs: both streams after step ``number``.
        number: of steps that were made; in the backward, of steps that are not undone yet.
    """

    def __init__(self) -> None:
        self.outputs: tuple[Tensor, Tensor] | None = None
        self.number = 0


@dataclass(frozen=True, eq=False)
class Streams:
    """The two streams of a reversible residual network, each ``[..., d]``."""

    first: Tensor
    second: Tensor
    chain: Chain = field(default_factory=Chain)

    @classmethod
    def of(cls, hidden: Tensor) -> Streams:
        """Return two streams that begin with the same values."""
        return cls(hidden, hidden)

    def mean(self) -> Tensor:
        """Return the mean of the streams, ``[..., d]``."""
        return (self.first + self.second) / 2


def reversible_step(
    streams: Streams,
    f: Branch,
    g: Branch,
    f_parameters: Sequence[Tensor] = (),
    g_parameters: Sequence[Tensor] = (),
    random: bool = False,
) -> Streams:
    """Return the streams after ``y1 = x1 + f(x2)``, ``y2 = x2 + g(y1)``; nothing of f and g is stored for the backward.

    Args:
        streams: before the step.
        f, g: functions of one tensor ``[..., d]``, called again in the backward. State that they change they change
            twice: what must not be computed again goes through ``recall``.
        f_parameters, g_parameters: tensors that get gradients, beside the streams: all that f and g read.
        random: f or g draw random numbers, as dropout does; the backward draws the same.

    The backward goes through all steps, once: it raises ``RuntimeError`` for a second one, and for a loss that does not
    depend on the last step.
    """
    learned = [p for p in (*f_parameters, *g_parameters) if p.requires_grad]
    if not (torch.is_grad_enabled() and (learned or streams.first.requires_grad or streams.second.requires_grad)):
        first = streams.first + f(streams.second)
        return Streams(first, streams.second + g(first), streams.chain)
    of_f = [p for p in f_parameters if p.requires_grad]
    of_g = [p for p in g_parameters if p.requires_grad]
    about = _Step(streams.chain, f, g, len(of_f), random)
    made = _Reversible.apply(about, streams.first, streams.second, *of_f, *of_g)
    return Streams(made[0], made[1], streams.chain)


class _Step:
    """One step: its functions, and what the backward needs to compute them again."""

    def __init__(self, chain: Chain, f: Branch, g: Branch, count: int, random: bool) -> None:
        self.chain, self.f, self.g, self.count, self.random = chain, f, g, count, random
        self.number = 0
        self.tapes: list[_Tape] = []
        self.states: list[list[Any]] = []
        self.autocast: list[tuple[str, bool, torch.dtype]] = []

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        devices = dict.fromkeys(("cpu", first.device.type))
        self.autocast = [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices]
        first = first + self._first_time(self.f, second)
        second = second + self._first_time(self.g, first)
        self.chain.number += 1
        self.number = self.chain.number
        self.chain.outputs = first.detach(), second.detach()
        return first, second

    def _first_time(self, branch: Branch, given: Tensor) -> Tensor:
        self.states.append(_random_state(given.device) if self.random else [])
        tape = _Tape(given.device if self.random else None)
        with _playing(tape):
            out = branch(given)
        self.tapes.append(tape.rewound())
        return out

    def again(self, which: int, given: Tensor, gradient: Tensor, parameters: Sequence[Tensor]) -> tuple[Tensor, Any]:
        """Compute f (0) or g (1) once more. Returns its output, and the gradients of its input and parameters."""
        given = given.detach().requires_grad_()
        branch, tape, state = (self.f, self.g)[which], self.tapes[which], self.states[which]
        with torch.enable_grad(), _autocast(self.autocast), _with_random(state, given.device), _playing(tape):
            out = branch(given)
        if not out.requires_grad:
            return out, [torch.zeros_like(given), *(None for _ in parameters)]
        found = torch.autograd.grad(out, [given, *parameters], gradient.to(out.dtype), allow_unused=True)
        own = torch.zeros_like(given) if found[0] is None else found[0]
        return out.detach(), [own, *found[1:]]


class _Reversible(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, step: _Step, first: Tensor, second: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        ctx.step, ctx.parameters = step, parameters
        return step.forward(first, second)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first_gradient: Tensor, second_gradient: Tensor) -> tuple[Any, ...]:
        step: _Step = ctx.step
        chain = step.chain
        if chain.outputs is None or chain.number != step.number:
            raise RuntimeError(
                "the backward of reversible layers begins at the last of them and runs once: compute the loss from the "
                "output of the model, and the forward again for a second backward"
            )
        first, second = chain.outputs
        of_f, of_g = ctx.parameters[: step.count], ctx.parameters[step.count :]
        change, (own, *g_gradients) = step.again(1, first, second_gradient, of_g)
        second, first_gradient = second - change, first_gradient + own
        change, (own, *f_gradients) = step.again(0, second, first_gradient, of_f)
        chain.outputs, chain.number = (first - change, second), step.number - 1
        if not chain.number:
            chain.outputs = None
        return None, first_gradient, second_gradient + own, *f_gradients, *g_gradients


class _Tape:
    """Values that a branch recalled, in their order, and the states of the random generators behind each of them."""

    def __init__(self, device: torch.device | None) -> None:
        self.device = device  # None if nothing is random
        self.values: list[tuple[Any, list[Any]]] = []
        self.place: int | None = None  # None while values are recorded

    def rewound(self) -> _Tape:
        self.place = 0
        return self

    def next(self, make: Callable[[], Any]) -> Any:
        if self.place is None:
            value = make()
            self.values.append((value, [] if self.device is None else _random_state(self.device)))
            return value
        value, states = self.values[self.place]
        self.place += 1
        if self.device is not None:
            _set_random_state(states, self.device)
        return value


_local = threading.local()


@contextmanager
def _playing(tape: _Tape) -> Iterator[None]:
    before = getattr(_local, "tape", None)
    _local.tape = tape
    try:
        yield
    finally:
        _local.tape = before


def recall(make: Callable[[], T]) -> T:
    """Return ``make()``; where a reversible step is computed again, what it was the first time.

    For values without gradient that rounding could change, such as the bucket of a token: they are stored until the
    backward.
    """
    tape: _Tape | None = getattr(_local, "tape", None)
    return make() if tape is None else tape.next(make)


def _random_state(device: torch.device) -> list[Any]:
    states: list[Any] = [torch.get_rng_state()]
    if device.type != "cpu" and hasattr(torch.get_device_module(device), "get_rng_state"):
        states.append(torch.get_device_module(device).get_rng_state(device))
    return states


@contextmanager
def _with_random(states: list[Any], device: torch.device) -> Iterator[None]:
    """Draw random numbers from ``states`` in the body, and go on as before afterwards."""
    if not states:
        yield
        return
    before = _random_state(device)
    _set_random_state(states, device)
    try:
        yield
    finally:
        _set_random_state(before, device)


def _set_random_state(states: list[Any], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device).set_rng_state(states[1], device)


@contextmanager
def _autocast(states: list[tuple[str, bool, torch.dtype]]) -> Iterator[None]:
    """Compute in the dtypes of the forward."""
    if not states:
        yield
        return
    (kind, enabled, dtype), *rest = states
    if not enabled and not torch.is_autocast_enabled(kind):
        with _autocast(rest):
            yield
        return
    with torch.autocast(kind, dtype=dtype, enabled=enabled), _autocast(rest):
        yield
