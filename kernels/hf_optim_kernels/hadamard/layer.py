"""What the modules of a checkpoint call where this package is installed."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import op


def compute(x: Tensor, block: int) -> Tensor | None:
    """Return the transform of ``x`` ``[..., channels]``, block by block; None for what the kernel does not compute."""
    return None if op.unsupported(x, block) is not None else op.hadamard(x, block)


def compute_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor] | None:
    """Return codes and scales of the transformed rows, see ``naive.hadamard_int8``; None for what no kernel computes.

    Eager calls go past PyTorch's dispatcher, which takes longer than the kernel.
    """
    if x.shape[-1] % block or not can_run_triton(x) or op.unsupported(x, block, quantize=True) is not None:
        return None
    if torch.compiler.is_compiling():
        return op.hadamard_int8(x, block)
    from . import launch

    return launch.hadamard(x, block, quantize=True)
