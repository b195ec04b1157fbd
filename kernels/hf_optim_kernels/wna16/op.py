"""The operator ``torch.ops.hf_optim.wna16``: ``x W^T + bias`` with a packed weight (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the kernels interpreted); for speed on a CPU see ``cpu``. It has a fake implementation: graphs
that hold it compile without a break, and a gradient with respect to ``x`` and ``bias``, for which the weight is decoded
again: a graph holds packed weights only.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import naive


def on_triton(x: Tensor) -> bool:
    """Whether the kernels run this input: on a CUDA device, or interpreted."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("hf_optim::wna16", mutates_args=())
def wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [..., in], float16, bfloat16 or float32.
        packed: int16 [chunks, out, plane], made by ``naive.pack``.
        scale: [groups, out], floating point.
        zero: [groups, out], whole numbers in [0, 2^width), of any type; None for the symmetric grid.
        bias: [out], or None.
        counters: int32, made by ``run.counters_for``; zeros before and after.
        width: bits of a stored code, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or ``in`` or more for one scale a row.
    """
    if on_triton(x):
        from .launch import wna16 as run

        return run(x, packed, scale, zero, bias, counters, width, group_size)
    return naive.wna16(x, packed, scale, zero, bias, width, group_size)


@wna16.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], packed.shape[1]))


@torch.library.custom_op("hf_optim::wna16_dense", mutates_args=())
def wna16_dense(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    width: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in] in ``dtype``. Arguments as of ``wna16``; ``columns`` is ``in``."""
    if on_triton(packed):
        from .launch import dense

        return dense(packed, scale, zero, width, group_size, columns, dtype)
    return naive.dequantize(packed, scale, zero, width, group_size, columns, torch.float32).to(dtype)


@wna16_dense.register_fake
def _(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    width: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return packed.new_empty((packed.shape[1], columns), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, scale, zero, _, _, width, group_size = inputs
    ctx.save_for_backward(packed, scale, *(() if zero is None else (zero,)))
    ctx.width, ctx.group_size, ctx.columns = width, group_size, x.shape[-1]


def _backward(ctx, grad: Tensor):
    packed, scale, *zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        weight = wna16_dense(
            packed, scale, zero[0] if zero else None, ctx.width, ctx.group_size, ctx.columns, grad.dtype
        )
        grad_x = grad @ weight
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None, None


wna16.register_autograd(_backward, setup_context=_setup_context)
