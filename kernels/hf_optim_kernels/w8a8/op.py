"""The operators ``hf_optim::w8a8`` and ``hf_optim::w8a8_codes``: 8-bit products (see ``naive``).

Importing this module registers them. On a CUDA device they run the Triton kernels, on a CPU the specification (or,
under ``TRITON_INTERPRET=1``, the interpreted kernels). The gradient of ``x`` passes straight through the quantization:
``grad_x = grad W`` with the dequantized weight. ``linear`` and ``linear_codes`` serve where no graph is recorded:
PyTorch's dispatch of an operator costs the host more than a launch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import InputGrid, PackedTensors

KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_triton(x: Tensor, dtype: torch.dtype) -> bool:
    """Return True if the Triton kernels run for ``x``, with outputs of ``dtype``."""
    return dtype in KERNEL_TYPES and can_run_triton(x)


def linear(x: Tensor, weight: PackedTensors, grid: InputGrid) -> Tensor:
    """Return ``torch.ops.hf_optim.w8a8`` of ``x`` [..., in] without PyTorch's dispatch, and without a gradient."""
    if on_triton(x, x.dtype):
        from . import launch

        return launch.linear(x, weight, grid)
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], weight.weight.shape[0]) + (0 if weight.bias is None else weight.bias)
    float8 = weight.weight.dtype == naive.FLOAT8
    codes, scale, zero = naive.quantize(x, float8, grid.is_symmetric, grid.scale, grid.zero)
    return naive.multiply(codes, scale, zero, weight.weight, weight.scale, weight.bias, x.dtype)


def linear_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: PackedTensors, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """Return ``torch.ops.hf_optim.w8a8_codes`` without PyTorch's dispatch."""
    if on_triton(codes, dtype):
        from . import launch

        return launch.linear_codes(codes, scale, zero, weight, dtype)
    return naive.multiply(codes, scale, zero, weight.weight, weight.scale, weight.bias, dtype)


@torch.library.custom_op("hf_optim::w8a8", mutates_args=())
def w8a8(
    x: Tensor, weight: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, counters: Tensor, symmetric: bool,
) -> Tensor:  # fmt: skip
    """Quantize ``x`` and multiply: [..., out] in the dtype of ``x``.

    Args:
        x: [..., in], floating point.
        weight, w_scale, w_sum, bias: see ``naive.PackedTensors``.
        x_scale, x_zero, symmetric: see ``naive.InputGrid``.
        counters: the split-k semaphores, int32 zeros (``launch.semaphores_for``), zero again afterwards. Calls that
            share them must not overlap.
    """
    return linear(x, PackedTensors(weight, w_scale, w_sum, bias, counters), InputGrid(x_scale, x_zero, symmetric))


@w8a8.register_fake
def _(x, weight, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    _, weight, w_scale = inputs[:3]
    ctx.save_for_backward(weight, w_scale)
    ctx.bias_type = None if inputs[4] is None else inputs[4].dtype
    ctx.inputs = len(inputs)


def _backward(ctx, grad: Tensor):
    weight, w_scale = ctx.saved_tensors
    grads: list[Tensor | None] = [None] * ctx.inputs
    if ctx.needs_input_grad[0]:
        grads[0] = grad @ naive.dequantize(weight, w_scale, None, torch.float32).to(grad.dtype)
    if ctx.needs_input_grad[4]:
        grads[4] = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
    return tuple(grads)


w8a8.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hf_optim::w8a8_codes", mutates_args=())
def w8a8_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, counters: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Multiply codes [..., in] from a quantizing epilogue: [..., out] in ``dtype``. No gradient.

    ``scale`` float32 [...] and ``zero`` int32 [...] (or None, or empty) are those of the rows; the rest as ``w8a8``.
    """
    return linear_codes(codes, scale, zero, PackedTensors(weight, w_scale, w_sum, bias, counters), dtype)


@w8a8_codes.register_fake
def _(codes, scale, zero, weight, w_scale, w_sum, bias, counters, dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)
