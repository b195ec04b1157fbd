"""The door to the kernel of a step in which tokens halt: used where it is installed, on the device of the tensors.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

HALTING_KERNEL = "hf_optim_kernels.halting.op"  # where it is installed
# Types of devices that use it: there it was faster, forward and with gradients, launched and replayed.
HALTING_KERNEL_DEVICES: tuple[str, ...] = ("cuda",)

_halting_kernels: list[Any] = []
"""The module of the kernel, or None if it is not installed; nothing before it was looked for."""


def find_halting_kernel() -> Any:
    """Return the module of the kernel; None if it is not installed."""
    if not _halting_kernels:
        try:
            _halting_kernels.append(importlib.import_module(HALTING_KERNEL))
        except ImportError:
            _halting_kernels.append(None)
    return _halting_kernels[0]


if HALTING_KERNEL_DEVICES and torch.cuda.is_available():
    find_halting_kernel()  # nothing can be imported while a graph is traced


def advanced_by_kernel(
    state: Tensor, read: Tensor, unit: tuple[Tensor, Tensor], before: tuple[Tensor, ...], epsilon: float, last: bool,
    blend: bool,
) -> tuple[Tensor, ...] | None:  # fmt: skip
    """Return total, remainder, steps, running and output after a step; None if no kernel computes it.

    Args:
        state: ``[B, N, d]`` after the step.
        read: ``[B, N, d]``: what the halting unit reads, maybe ``state``.
        unit: its weight ``[d]`` and bias ``[]``.
        before: total, remainder, steps, running (``[B, N]``) and output (``[B, N, d]``) before the step.
        epsilon, last: as in ``Progress``.
        blend: mix by ``t2t``.
    """
    device = state.device
    module = find_halting_kernel() if device.type in HALTING_KERNEL_DEVICES else None
    other = None if read is state else read
    if module is None or module.unsupported(state, other, *unit) is not None:
        return None
    if any(part.device != device for part in (*unit, *before)):
        return None
    return module.halting_step(state, other, *unit, *before, epsilon, last, blend)[:5]  # type: ignore[no-any-return]
