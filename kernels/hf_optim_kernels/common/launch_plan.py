"""Launching Triton kernels with little work on the host.

``kernel[grid](...)`` binds, specializes and hashes its arguments in Python at every call, which takes longer than a
decode kernel runs. ``launch`` does that once for each key and from then on calls the compiled kernel itself; a ``Plan``
also keeps everything that does not change from call to call of one layer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

_current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
_current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_capturing: Any = getattr(torch._C, "_cuda_isCurrentStreamCapturing", None)


class Compiled:
    """A compiled kernel: called with a grid, a stream, and the run-time arguments (addresses or tensors, numbers)."""

    __slots__ = ("function", "metadata", "run", "tail")

    def __init__(self, compiled: Any, constants: dict[str, Any]) -> None:
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.tail = tuple(constants.values())

    def __call__(self, grid: tuple[int, int, int], stream: int, args: tuple | list) -> None:
        self.run(grid[0], grid[1], grid[2], stream, self.function, self.metadata, None, None, None, *args, *self.tail)


_COMPILED: dict[tuple, Compiled] = {}


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple,
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    key: tuple,
) -> Compiled | None:
    """Run ``kernel`` on the current stream of its tensors' device.

    Args:
        kernel: a ``triton.jit`` function whose parameters are run-time arguments first, ``tl.constexpr`` last.
        grid: programs in each of three dimensions; none of them is zero.
        args: tensors, ints and floats, in the kernel's order; the first is a tensor, and names the device.
        constants: every constexpr by name, in the kernel's order.
        num_warps, num_stages: compile options.
        key: hashable; calls with equal keys must compile to the same code: it determines dtypes, constants,
            options, the alignment of pointers and what Triton specializes of integers (1, multiples of 16).

    Returns the compiled kernel; None where Triton interprets.
    """
    device = args[0].device
    if device.type != "cuda" or interpreted(kernel):
        kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        return None
    index = device.index
    if index != _current_device():
        with torch.cuda.device(device):
            return launch(kernel, grid, args, constants, num_warps=num_warps, num_stages=num_stages, key=key)
    whole = (id(kernel), index, key)
    found = _COMPILED.get(whole)
    if found is None:
        compiled = kernel[grid](*args, **constants, num_warps=num_warps, num_stages=num_stages)
        found = _COMPILED[whole] = Compiled(compiled, constants)
        return found
    # Addresses instead of tensors: the launcher would ask the driver about each pointer.
    found(grid, _current_stream(index), [a.data_ptr() if isinstance(a, Tensor) else a for a in args])
    return found


class Plan:
    """One layer's launch for inputs of one shape: ``plan(x)`` allocates the output and launches, nothing else.

    Args:
        compiled: what ``launch`` returned for such an input; its arguments are ``x``, ``before``, the output, scratch
            memory, and ``after``.
        before, after: addresses and numbers that stay.
        shape, dtype, device: of the output.
        scratch: float32 numbers that the programs of a launch exchange through memory; 0 for none.
    """

    __slots__ = ("after", "before", "compiled", "device", "dtype", "grid", "index", "scratch", "shape")

    def __init__(
        self,
        compiled: Compiled,
        grid: tuple[int, int, int],
        before: tuple,
        after: tuple,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        scratch: int,
    ) -> None:
        self.compiled, self.grid, self.before, self.after = compiled, grid, before, (*after, *compiled.tail)
        self.shape, self.dtype, self.device, self.index, self.scratch = shape, dtype, device, device.index, scratch

    def __call__(self, x: Tensor) -> Tensor | None:
        """The output; None where this plan does not fit the moment (another current device, unaligned input)."""
        at, index = x.data_ptr(), self.index
        if at & 15 or _current_device() != index:
            return None
        out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        stream, made, grid = _current_stream(index), self.compiled, self.grid
        held = scratch(self.scratch, index, stream) if self.scratch else out
        made.run(
            grid[0], grid[1], grid[2], stream, made.function, made.metadata, None, None, None,
            at, *self.before, out.data_ptr(), held.data_ptr(), *self.after,
        )  # fmt: skip
        return out


_SCRATCH: dict[tuple[int, int], Tensor] = {}


def scratch(size: int, index: int, stream: int) -> Tensor:
    """At least ``size`` float32 numbers that the launches of a stream share, one after the other.

    A launch that is being captured has memory of its own: its graph may be replayed on any stream.
    """
    if _capturing():
        return torch.empty(size, dtype=torch.float32, device=torch.device("cuda", index))
    found = _SCRATCH.get((index, stream))
    if found is None or found.numel() < size:
        found = torch.empty(max(size, 1 << 20), dtype=torch.float32, device=torch.device("cuda", index))
        _SCRATCH[index, stream] = found
    return found


def aligned(*tensors: Tensor) -> bool:
    """Whether every tensor begins at a multiple of 16 bytes: part of a key where views may not."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def interpreted(kernel: Any) -> bool:
    """Whether Triton interprets its kernels (``TRITON_INTERPRET=1`` when this one was defined)."""
    return not isinstance(kernel, triton.runtime.JITFunction)
