"""The operators ``hf_optim::w8a8`` and ``hf_optim::w8a8_codes``: 8-bit products (see ``naive``).

Importing this module registers them. On a CUDA device they run the Triton kernels, on a CPU the specification (or,
under ``TRITON_INTERPRET=1``, the kernels interpreted). The gradient of ``x`` passes the quantization straight through:
``grad_x = grad W`` with the dequantized weight. Code runs under a name with an underscore where no graph is recorded:
PyTorch's dispatch of an operator costs more of the host than a launch.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import naive

KERNEL_TYPES = (torch.bfloat16, torch.float16, torch.float32)


def on_triton(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels take this input."""
    return (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1") and dtype in KERNEL_TYPES


def linear(
    x: Tensor, weight: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, counters: Tensor, symmetric: bool,
) -> Tensor:  # fmt: skip
    """``torch.ops.hf_optim.w8a8`` without PyTorch's dispatch, and without a gradient."""
    if on_triton(x, x.dtype):
        from .launch import linear as kernel

        return kernel(x, weight, w_scale, w_sum, bias, x_scale, x_zero, counters, symmetric)
    if not x.shape[-1]:
        return x.new_zeros(*x.shape[:-1], weight.shape[0]) + (0 if bias is None else bias)
    codes, scale, zero = naive.quantize(x, weight.dtype == naive.FLOAT8, symmetric, x_scale, x_zero)
    return naive.multiply(codes, scale, zero, weight, w_scale, bias, x.dtype)


def linear_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, counters: Tensor, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``torch.ops.hf_optim.w8a8_codes`` without PyTorch's dispatch."""
    if on_triton(codes, dtype):
        from .launch import linear_codes as kernel

        return kernel(codes, scale, zero, weight, w_scale, w_sum, bias, counters, dtype)
    return naive.multiply(codes, scale, zero, weight, w_scale, bias, dtype)


@torch.library.custom_op("hf_optim::w8a8", mutates_args=())
def w8a8(
    x: Tensor, weight: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, counters: Tensor, symmetric: bool,
) -> Tensor:  # fmt: skip
    """Quantize ``x`` and multiply: [..., out] in the type of ``x``.

    Args:
        x: [..., in], floating.
        weight: codes [out, in], int8 or float8_e4m3fn, contiguous; inputs are quantized to the same type.
        w_scale: float32 [out].
        w_sum: int32 [out], the sums of the rows of an int8 weight; read where inputs are asymmetric.
        bias: [out], or None.
        x_scale, x_zero: [1], the static grid of inputs; None where each row has its own.
        counters: int32 zeros (``run.counters_for``), zero again afterwards. Calls that share it must not overlap.
        symmetric: whether the grid of inputs has no zero points.
    """
    return linear(x, weight, w_scale, w_sum, bias, x_scale, x_zero, counters, symmetric)


@w8a8.register_fake
def _(x, weight, w_scale, w_sum, bias, x_scale, x_zero, counters, symmetric) -> Tensor:
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
    """Multiply codes [..., in] that a fused quantizer made: [..., out] in ``dtype``. No gradient.

    ``scale`` float32 [...], ``zero`` int32 [...] (or None, or empty) are those of the rows; the rest as ``w8a8``.
    """
    return linear_codes(codes, scale, zero, weight, w_scale, w_sum, bias, counters, dtype)


@w8a8_codes.register_fake
def _(codes, scale, zero, weight, w_scale, w_sum, bias, counters, dtype) -> Tensor:
    return codes.new_empty((*codes.shape[:-1], weight.shape[0]), dtype=dtype)
