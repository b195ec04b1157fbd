"""The door to the kernel of Hadamard transforms: used where it is installed, in inference on a GPU.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

HADAMARD_KERNEL = "hf_optim_kernels.hadamard.layer"  # where it is installed
HADAMARD_DEVICES = ("cuda",)

_hadamard_kernels: list[Any] = []
"""The module of the kernel, or None if it is not installed; nothing before it was looked for."""


def find_hadamard_kernel() -> Any:
    """Return the module of the kernel; None if it is not installed."""
    if not _hadamard_kernels:
        try:
            _hadamard_kernels.append(importlib.import_module(HADAMARD_KERNEL))
        except ImportError:
            _hadamard_kernels.append(None)
    return _hadamard_kernels[0]


if torch.cuda.is_available():
    find_hadamard_kernel()  # nothing can be imported while a graph is traced


def transform_by_kernel(x: Tensor, block: int) -> Tensor | None:
    """Return ``hadamard_blocks(x, block)`` of the kernel; None if no kernel computes it."""
    if x.device.type not in HADAMARD_DEVICES or (torch.is_grad_enabled() and x.requires_grad):
        return None
    module = find_hadamard_kernel()
    return None if module is None else module.compute(x, block)
