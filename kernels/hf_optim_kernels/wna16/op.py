"""The operator ``torch.ops.hf_optim.wna16``: ``x W^T + bias`` with a packed weight (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernel, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the kernel interpreted); for speed on a CPU see ``cpu``. It has a fake implementation, so graphs
that hold it compile without a break, and a gradient with respect to ``x`` and ``bias``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import naive


@torch.library.custom_op("hf_optim::wna16", mutates_args=())
def wna16(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, width: int, group_size: int
) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [..., in], float16, bfloat16 or float32.
        packed: uint8 [out, bytes], made by ``naive.pack``.
        scale: [groups, out], floating point.
        zero: [groups, out], whole numbers in [0, 2^width], of any type; None for the symmetric grid.
        bias: [out], or None.
        width: bits of a stored code, 4 or 8.
        group_size: columns that share a scale; ``in`` or more for one scale a row.
    """
    if x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        from .kernel import wna16 as kernel

        return kernel(x, packed, scale, zero, bias, width, group_size)
    return naive.wna16(x, packed, scale, zero, bias, width, group_size)


@wna16.register_fake
def _(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, width: int, group_size: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, zero, _, width, group_size = inputs
    ctx.save_for_backward(packed, scale, *(() if zero is None else (zero,)))
    ctx.width, ctx.group_size, ctx.columns = width, group_size, x.shape[-1]


def _backward(ctx, grad: Tensor):
    packed, scale, *zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = naive.dequantize(packed, scale, zero[0] if zero else None, ctx.width, ctx.group_size, ctx.columns)
        grad_x = grad @ weight.to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None


wna16.register_autograd(_backward, setup_context=_setup_context)
