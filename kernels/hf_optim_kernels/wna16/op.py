"""The operator ``torch.ops.hf_optim.wna16``: ``x W^T + bias`` with a packed weight (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the interpreted kernels); ``cpu`` is the fast path of a CPU. The operator has a fake
implementation, so that graphs with it compile without a break, and a gradient with respect to ``x`` and ``bias``, for
which the weight is decoded again: a graph holds packed weights only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import PackedTensors


def linear(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``torch.ops.hf_optim.wna16`` of ``x`` [..., in] without PyTorch's dispatch, and without a gradient."""
    if can_run_triton(x):
        from . import launch

        return launch.wna16(x, weight)
    return naive.wna16(x, weight)


@torch.library.custom_op("hf_optim::wna16", mutates_args=())
def wna16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, counters: Tensor, width: int,
    group_size: int, format: int = 0, divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return ``x W^T + bias``: [..., out].

    Args:
        x: [..., in], float16, bfloat16 or float32.
        counters: the split-k semaphores, int32, made by ``launch.semaphores_for``; zeros before and after.
        packed, scale, zero, bias, width, group_size, format, divisor: see ``naive.PackedTensors``.
    """
    return linear(x, PackedTensors(packed, scale, zero, bias, counters, width, group_size, format, divisor))


@wna16.register_fake
def _(x, packed, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


@torch.library.custom_op("hf_optim::wna16_dense", mutates_args=())
def wna16_dense(
    packed: Tensor, scale: Tensor, zero: Tensor | None, width: int, group_size: int, columns: int, dtype: torch.dtype,
    format: int = 0, divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the weight [out, in] in ``dtype``. Arguments as of ``wna16``; ``columns`` is ``in``."""
    weight = PackedTensors(packed, scale, zero, None, None, width, group_size, format, divisor)
    if can_run_triton(packed):
        from . import launch

        return launch.dense(weight, columns, dtype)
    return naive.dequantize(weight, columns).to(dtype)


@wna16_dense.register_fake
def _(packed, scale, zero, width, group_size, columns, dtype, *_) -> Tensor:
    return packed.new_empty((packed.shape[1], columns), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, zero, _, _, width, group_size, format, divisor = inputs
    ctx.held = zero is not None, divisor is not None
    ctx.save_for_backward(packed, scale, *(each for each in (zero, divisor) if each is not None))
    ctx.width, ctx.group_size, ctx.columns, ctx.format = width, group_size, x.shape[-1], format


def _backward(ctx, grad: Tensor):
    packed, scale, *rest = ctx.saved_tensors
    zero, divisor = (rest.pop(0) if held else None for held in ctx.held)
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = wna16_dense(
            packed, scale, zero, ctx.width, ctx.group_size, ctx.columns, grad.dtype, ctx.format, divisor
        )
        grad_x = grad @ weight
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, *(None,) * 5


wna16.register_autograd(_backward, setup_context=_setup_context)
