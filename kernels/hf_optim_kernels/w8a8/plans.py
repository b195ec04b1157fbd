"""Launches of one layer, kept ready for inputs of one shape.

``recorded`` runs a function once and notes its launches; the ``Plan`` it returns makes the same launches again, on
another input: it allocates the output and everything in between in two pieces, and looks nothing up. What a decode
step of a small layer costs is the work on the host, and this is little more than the launches themselves.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..common import launch_plan

# Shapes of inputs whose launches are kept; a server's prompts have ever new ones.
MOST_PLANS = 64
ALIGNMENT = 256

_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class _State(threading.local):
    log: list[tuple] | None = None


_STATE = _State()


def launch(kernel: Any, grid: tuple[int, int, int], args: tuple, constants: dict[str, Any], **options: Any) -> None:
    """``launching.launch``, noted where a function is being recorded."""
    compiled = launch_plan.launch(kernel, grid, args, constants, **options)
    if _STATE.log is not None:
        _STATE.log.append((compiled, grid, args))


def unplanned() -> None:
    """What runs now is more than launches, or a launch that needs more than its arguments: it cannot be recorded."""
    if _STATE.log is not None:
        _STATE.log.append((None, None, ()))


class Plan:
    """The launches of one function for inputs of one shape. ``plan(x)`` is the output, or None where it does not fit.

    Attributes:
        steps: of each launch, what is compiled, its grid, its arguments, and which of them are the input, the output,
            and memory in between (as pairs of position and offset in bytes).
        held: bytes in between.
    """

    __slots__ = ("device", "dtype", "held", "index", "shape", "steps")

    def __init__(self, steps: list[tuple], y: Tensor, held: int) -> None:
        self.steps, self.held = steps, held
        self.shape, self.dtype, self.device, self.index = y.shape, y.dtype, y.device, y.device.index

    def __call__(self, x: Tensor) -> Tensor | None:
        index, at = self.index, x.data_ptr()
        if at & 15 or _current_device() != index:
            return None
        y = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        held = torch.empty(self.held, dtype=torch.int8, device=self.device) if self.held else y
        bases = (at, y.data_ptr(), held.data_ptr())
        stream = _current_stream(index)
        for compiled, grid, args, places in self.steps:
            given = list(args)
            for position, base, offset in places:
                given[position] = bases[base] + offset
            compiled(grid, stream, given)
        return y


def recorded(call: Callable[[], Tensor], x: Tensor, kept: list[Tensor]) -> tuple[Tensor, Plan | None]:
    """Run ``call``, a function of ``x`` alone and of the tensors ``kept``; its result, and a plan where there is one.

    There is none where the work is more than launches, or Triton interprets.
    """
    log: list[tuple] = []
    _STATE.log = log
    try:
        y = call()
    finally:
        _STATE.log = None
    if not log or any(compiled is None for compiled, _, _ in log):
        return y, None
    places: dict[int, tuple[int, int]] = {}
    fixed = {_storage(tensor) for tensor in kept}
    held = 0
    steps = []
    for compiled, grid, args in log:
        found = []
        for position, value in enumerate(args):
            if not isinstance(value, Tensor) or _storage(value) in fixed:
                continue
            if _storage(value) in (_storage(x), _storage(y)):
                base, start = (0, x) if _storage(value) == _storage(x) else (1, y)
                found.append((position, base, value.data_ptr() - start.data_ptr()))
                continue
            if _storage(value) not in places:
                places[_storage(value)] = (2, held)
                held += -(-value.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
            base, offset = places[_storage(value)]
            found.append((position, base, offset + value.data_ptr() - _storage(value)))
        given = tuple(value.data_ptr() if isinstance(value, Tensor) else value for value in args)
        steps.append((compiled, grid, given, tuple(found)))
    return y, Plan(steps, y, held)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Planned(nn.Module):
    """A layer that keeps the launches for the inputs it has seen. Its buffers must stay where they are."""

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[torch.Size, Plan | None] = {}

    def planned(self, x: Tensor, call: Callable[[], Tensor]) -> Tensor:
        """``call()``, a function of ``x`` and the layer's buffers, by the plan for such an input where there is one."""
        plan = self.plans.get(x.shape)
        fits = x.is_contiguous()
        if plan is not None and fits:
            y = plan(x)
            return call() if y is None else y
        if fits and x.shape not in self.plans and len(self.plans) < MOST_PLANS and x.numel() and launch_plan.aligned(x):
            kept = [buffer for buffer in self.buffers() if buffer.numel()]
            y, self.plans[x.shape] = recorded(call, x, kept)
            return y
        return call()

    def renew(self) -> None:
        """Forget what holds addresses of the buffers: one of them is another tensor now."""
        self.plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Planned:
        self.renew()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}
