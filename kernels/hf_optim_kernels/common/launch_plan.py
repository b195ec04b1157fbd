"""Record the launches of a layer, and replay them for other inputs of the same shape.

``record`` runs a function once and notes its launches. The ``LaunchPlan`` it returns repeats them for another input: it
allocates the output and the intermediate memory, and looks nothing up. The work on the host is what a decode step of a
small layer costs, and this is little more than the launches themselves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .launch import RECORDER, Compiled, current_device, current_stream, is_aligned

# Input shapes whose launches are kept: a server sees new prompt lengths all the time.
MOST_PLANS = 64
# Intermediate buffers start at multiples of this many bytes.
ALIGNMENT = 256
# Bytes of the memory that the launches of a stream share: at least, and at most per launch.
LEAST_SHARED, MOST_SHARED = 4 << 20, 64 << 20
# Where a launcher takes the stream (after the three dimensions of the grid), and the first argument of the kernel.
STREAM, FIRST = 3, 9

_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)
_shared: dict[tuple[int | None, int], Tensor] = {}


class LaunchPlan:
    """The launches of one function for inputs of one shape.

    Attributes:
        steps: of each launch, the launcher; its arguments, in which addresses are filled in; the positions of input,
            output and intermediate memory (that of the stream, which is filled in last, for an address that the kernel
            does not take); and further addresses, each a position, a base (0 input, 1 output, 2 intermediate memory)
            and an offset in bytes.
        shape, dtype, device, index: of the output; ``index`` is the number of the device.
        size: bytes of intermediate memory.
        is_shared: True if that memory may be the stream's. Launches of a stream follow each other, but another thread
            may launch between two steps of this plan.
    """

    __slots__ = ("device", "dtype", "index", "is_shared", "shape", "size", "steps")

    def __init__(self, steps: list[tuple], y: Tensor, size: int) -> None:
        self.steps, self.size, self.is_shared = steps, size, len(steps) == 1 and size <= MOST_SHARED
        # ``torch.empty`` takes a tuple faster than a ``torch.Size``.
        self.shape, self.dtype, self.device, self.index = tuple(y.shape), y.dtype, y.device, y.device.index

    def allocate(self, stream: int) -> Tensor:
        """Return new intermediate memory; unless a graph is being captured, it becomes the stream's if it may.

        A launch that is being captured has its own memory: its graph may be replayed on any stream.
        """
        if not self.is_shared or _capturing():
            return torch.empty(self.size, dtype=torch.int8, device=self.device)
        memory = torch.empty(max(self.size, LEAST_SHARED), dtype=torch.int8, device=self.device)
        _shared[self.index, stream] = memory
        return memory


class PlannedLinear(nn.Module):
    """A linear layer that keeps the launches of the input shapes it has seen. Its buffers must stay where they are.

    Attributes:
        dtype: of inputs and outputs.
        semaphores: a buffer of split-k semaphores, on the device of the layer.
        plans: launches by the shape of the input; None where a call is more than launches.
    """

    dtype: torch.dtype

    def __init__(self) -> None:
        super().__init__()
        self.plans: dict[torch.Size, LaunchPlan | None] = {}

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` has the dtype and the device of the layer."""
        # Past nn.Module.__getattr__: PackedLinear calls this every time.
        return x.dtype == self.dtype and x.device == self._buffers["semaphores"].device  # type: ignore[union-attr]

    def compute(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in] without a gradient, past PyTorch's dispatcher."""
        raise NotImplementedError

    def planned(self, x: Tensor) -> Tensor:
        """Return ``compute(x)``, by a plan for inputs of its shape on a CUDA device if there is one."""
        # Every eager call takes this path, so it is inlined: in a decode step the host time of each look-up counts.
        plan = self.plans.get(x.shape)
        if plan is None or not x.is_cuda or x.dtype != self.dtype or not x.is_contiguous():
            return self._record(x)
        address, index = x.data_ptr(), plan.index
        if address & 15 or current_device() != index:
            return self.compute(x)
        y = torch.empty(plan.shape, dtype=plan.dtype, device=plan.device)
        stream, size, memory = current_stream(index), plan.size, y
        if size:
            shared = _shared.get((index, stream)) if plan.is_shared and not _capturing() else None
            memory = plan.allocate(stream) if shared is None or shared.numel() < size else shared
        output, between = y.data_ptr(), memory.data_ptr()
        for run, arguments, at_x, at_y, at_memory, others in plan.steps:
            given = arguments.copy()
            given[at_x] = address
            given[at_y] = output
            given[at_memory] = between
            given[STREAM] = stream
            for position, base, offset in others:
                given[position] = (address, output, between)[base] + offset
            run(*given)
        return y

    def _record(self, x: Tensor) -> Tensor:
        can_plan = x.is_cuda and x.dtype == self.dtype and x.numel() and x.is_contiguous() and is_aligned(x)
        if not can_plan or x.shape in self.plans or len(self.plans) >= MOST_PLANS:
            return self.compute(x)
        y, self.plans[x.shape] = record(lambda: self.compute(x), x, [b for b in self.buffers() if b.numel()])
        return y

    def renew(self) -> None:
        """Forget the addresses of the buffers: one of them is another tensor now."""
        self.plans = {}

    def _apply(self, fn: Any, recurse: bool = True) -> PlannedLinear:
        self.renew()
        return super()._apply(fn, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "plans": {}}


def prevent_recording() -> None:
    """Mark the current work as more than launches of given arguments: a running ``record`` then returns no plan."""
    if RECORDER.log is not None:
        RECORDER.log.append((None, (), ()))


def record(call: Callable[[], Tensor], x: Tensor, kept: list[Tensor]) -> tuple[Tensor, LaunchPlan | None]:
    """Run ``call`` and return its result, with a plan that repeats its launches.

    Args:
        call: a function of ``x`` and of the tensors ``kept`` alone.
        kept: tensors that stay where they are.

    The plan is None if the work is more than launches, or Triton interprets.
    """
    log: list[tuple[Compiled | None, tuple, tuple]] = []
    RECORDER.log = log
    try:
        y = call()
    finally:
        RECORDER.log = None
    written = {_storage(value) for _, _, args in log for value in args if isinstance(value, Tensor)}
    fills_storage = y.is_contiguous() and y.untyped_storage().nbytes() == y.numel() * y.element_size()
    if _storage(y) not in written or not fills_storage:
        return y, None
    fixed = {_storage(tensor) for tensor in kept}
    offsets: dict[int, int] = {}  # of storages in the intermediate memory
    launches, size = [], 0
    for compiled, grid, args in log:
        if compiled is None:
            return y, None
        moving = [(i, a) for i, a in enumerate(args) if isinstance(a, Tensor) and _storage(a) not in fixed]
        for _, tensor in moving:
            if _storage(tensor) not in (_storage(x), _storage(y), *offsets):
                offsets[_storage(tensor)] = size
                size += -(-tensor.untyped_storage().nbytes() // ALIGNMENT) * ALIGNMENT
        places = [(i, *_place(tensor, x, y, offsets)) for i, tensor in moving]
        addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
        launches.append((compiled.run, compiled.arguments(grid, None, addresses), places))
    return y, LaunchPlan([_step(*launched, has_memory=size > 0) for launched in launches], y, size)


def _place(tensor: Tensor, x: Tensor, y: Tensor, offsets: dict[int, int]) -> tuple[int, int]:
    """Return what a tensor is part of (see ``LaunchPlan.steps``), and its offset there."""
    storage = _storage(tensor)
    if storage == _storage(x):
        return 0, tensor.data_ptr() - x.data_ptr()
    if storage == _storage(y):
        return 1, tensor.data_ptr() - y.data_ptr()
    return 2, offsets[storage] + tensor.data_ptr() - storage


def _step(run: Any, arguments: list[Any], places: list[tuple[int, int, int]], has_memory: bool) -> tuple:
    found, others = [STREAM] * 3, []
    for position, base, offset in places:
        # Without intermediate memory its address is the output's, which a kernel may take twice.
        slot = 2 if base == 1 and found[1] != STREAM and not has_memory else base
        if offset or found[slot] != STREAM:
            others.append((FIRST + position, base, offset))
        else:
            found[slot] = FIRST + position
    return run, arguments, *found, tuple(others)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
