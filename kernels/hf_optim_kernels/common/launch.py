"""Launch Triton kernels with little work on the host.

``kernel[grid](...)`` binds, specializes and hashes its arguments in Python at every call, which takes longer than a
decode kernel runs. ``launch`` does that once per key and from then on calls the compiled kernel itself.
"""

from __future__ import annotations

import threading
from functools import cache
from typing import Any

import torch
from torch import Tensor

current_device: Any = getattr(torch._C, "_cuda_getDevice", None)
current_stream: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)


class Compiled:
    """A compiled kernel: called with a grid, a stream, and the run-time arguments (addresses or tensors, numbers)."""

    __slots__ = ("function", "metadata", "run", "tail")

    def __init__(self, compiled: Any, constants: dict[str, Any]) -> None:
        self.run, self.function, self.metadata = compiled.run, compiled.function, compiled.packed_metadata
        self.tail = tuple(constants.values())

    def arguments(self, grid: tuple[int, int, int], stream: int | None, args: tuple | list) -> list[Any]:
        """Return what ``run`` takes; the three ``None`` are launch hooks."""
        return [*grid, stream, self.function, self.metadata, None, None, None, *args, *self.tail]


_COMPILED: dict[tuple, Compiled] = {}


class Recorder(threading.local):
    """The launches of the current thread, while they are being recorded (``launch_plan.record``).

    Attributes:
        log: of each launch, the compiled kernel (None if interpreted), grid and arguments; None if not recording.
    """

    log: list[tuple[Compiled | None, tuple, tuple]] | None = None


RECORDER = Recorder()


def launch(
    kernel: Any,
    grid: tuple[int, int, int],
    args: tuple,
    constants: dict[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    key: tuple,
    device: Any = None,
    registers: int = 0,
    early: int = 0,
) -> None:
    """Run ``kernel`` on the current stream of its tensors' device, and note it in a running ``record``.

    Args:
        kernel: a ``triton.jit`` function whose parameters are run-time arguments first, ``tl.constexpr`` last.
        grid: programs in each of three dimensions; none of them is zero.
        args: tensors, tensor descriptors, ints and floats, in the kernel's order.
        constants: every constexpr by name, in the kernel's order.
        num_warps, num_stages: compile options.
        key: hashable; calls with equal keys must compile to the same code: it determines dtypes, constants,
            options, the alignment of pointers and what Triton specializes of integers (1, multiples of 16).
        device: of the tensors; None takes that of the first argument, a tensor.
        registers: most registers of a thread; 0: as many as the compiler takes.
        early: 1 if the kernel may begin before the launch before it has ended, which it awaits itself (``gdc_wait``).
    """
    device, compiled = device or args[0].device, None
    if device.type != "cuda" or is_interpreted(kernel):
        kernel[grid](*args, **_all_of(kernel, args, constants), **_options(num_warps, num_stages, registers, early))
    elif device.index != current_device():
        with torch.cuda.device(device):
            return launch(
                kernel, grid, args, constants, num_warps=num_warps, num_stages=num_stages, key=key, device=device,
                registers=registers, early=early,
            )  # fmt: skip
    else:
        full_key = (id(kernel), device.index, key)
        compiled = _COMPILED.get(full_key)
        if compiled is None:
            constants = _all_of(kernel, args, constants)
            made = kernel[grid](*args, **constants, **_options(num_warps, num_stages, registers, early))
            compiled = _COMPILED[full_key] = Compiled(made, constants)
        else:
            # Addresses instead of tensors: the launcher would query the driver for each pointer.
            addresses = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
            compiled.run(*compiled.arguments(grid, current_stream(device.index), addresses))
    if RECORDER.log is not None:
        RECORDER.log.append((compiled, grid, args))


def _all_of(kernel: Any, args: tuple, constants: dict[str, Any]) -> dict[str, Any]:
    """Return the constants in the kernel's order. One that has a default must be given, too: a launch counts them.

    Raises ``TypeError`` if one is missing, or is none of the kernel's.
    """
    names = getattr(kernel, "arg_names", None)
    if names is None:  # of a wrapper
        return constants
    names = names[len(args) :]
    if set(names) != set(constants):
        wrong = sorted(set(names) ^ set(constants))
        raise TypeError(f"{kernel.__name__}: the constants {', '.join(wrong)} are missing, or are not among its own")
    return {name: constants[name] for name in names}


def _options(warps: int, stages: int, registers: int, early: int) -> dict[str, int | bool]:
    """Return compile options as Triton names them."""
    more = {"maxnreg": registers} if registers else {}
    return {"num_warps": warps, "num_stages": stages, **more, **({"launch_pdl": True} if early else {})}


def begins_early(tensor: Tensor) -> bool:
    """Return True if a launch on a tensor's device can begin before the one before it has ended (``early``)."""
    return tensor.is_cuda and _capability(tensor.device.index) >= (9, 0)


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def is_aligned(*tensors: Tensor) -> bool:
    """Return True if every tensor begins at a multiple of 16 bytes. Belongs to a key wherever a view may not."""
    return not any(tensor.data_ptr() % 16 for tensor in tensors)


def is_interpreted(kernel: Any) -> bool:
    """Return True if Triton interprets ``kernel`` (``TRITON_INTERPRET=1`` when it was defined)."""
    return type(kernel).__module__ == "triton.runtime.interpreter"
