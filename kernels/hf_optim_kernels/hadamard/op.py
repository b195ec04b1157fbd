"""The operators ``torch.ops.hf_optim.hadamard`` and ``hadamard_int8`` (see ``naive``), for inference.

Importing this module registers them. On a CUDA device they run the Triton kernel, on a CPU ``cpu`` (or, under
``TRITON_INTERPRET=1``, the interpreted kernel). They have fake implementations, and nothing waits for the host, so that
a call can be captured and compiled. ``hadamard`` has a gradient, which is the same transform.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import cpu
from .naive import check


def unsupported(x: Tensor, block: int, quantize: bool = False) -> str | None:
    """Return why the kernel does not transform ``x``; None if it does."""
    from . import launch

    return launch.unsupported(x, block, quantize)


@torch.library.custom_op("hf_optim::hadamard", mutates_args=())
def hadamard(x: Tensor, block: int) -> Tensor:
    """Return ``naive.hadamard``. Raises ``ValueError`` for a block that does not fit."""
    check(x, block)
    if can_run_triton(x) and unsupported(x, block) is None:
        from . import launch

        return launch.hadamard(x, block)[0]
    return cpu.hadamard(x, block).clone()  # an operator does not return its argument


@hadamard.register_fake
def _(x: Tensor, block: int) -> Tensor:
    return x.new_empty(x.shape)


def _keep_block(ctx, inputs, output) -> None:
    ctx.block = inputs[1]


def _backward(ctx, upstream: Tensor):
    return hadamard(upstream.contiguous(), ctx.block), None


hadamard.register_autograd(_backward, setup_context=_keep_block)


@torch.library.custom_op("hf_optim::hadamard_int8", mutates_args=())
def hadamard_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return ``naive.hadamard_int8``: codes int8 ``[..., channels]`` and scales float32 ``[...]``."""
    check(x, block)
    if can_run_triton(x) and unsupported(x, block, quantize=True) is None:
        from . import launch

        return launch.hadamard(x, block, quantize=True)
    return cpu.hadamard_int8(x, block)


@hadamard_int8.register_fake
def _(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[:-1], dtype=wide)
