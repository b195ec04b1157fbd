"""The operator ``hf_optim::llm_int8`` (see ``naive``). Importing this module registers it.

On a CUDA device it runs the Triton kernels, without waiting for the device; on a CPU PyTorch's integer product (or,
under ``TRITON_INTERPRET=1``, the kernels interpreted). The gradient of ``x`` passes the quantization straight through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..w8a8.op import on_triton
from . import cpu, naive


def linear(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor
) -> Tensor:  # fmt: skip
    """``torch.ops.hf_optim.llm_int8`` without PyTorch's dispatch, and without a gradient."""
    if on_triton(x, x.dtype):
        from .launch import llm_int8 as kernel

        return kernel(x, weight, w_scale, bias, threshold, counters)
    return cpu.llm_int8(x, weight, w_scale, bias, threshold)


@torch.library.custom_op("hf_optim::llm_int8", mutates_args=())
def llm_int8(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor
) -> Tensor:  # fmt: skip
    """``x W^T + bias`` with outlier columns of ``x`` in its own type.

    Args:
        x: [..., in], floating.
        weight: int8 codes [out, in] in [-127, 127], contiguous.
        w_scale: float32 [out].
        bias: [out], or None.
        threshold: columns with a larger magnitude are outliers: with 0 all of them, with infinity none.
        counters: int32 zeros (``counters_size`` of them), zero again afterwards. Calls that share it must not overlap.
    """
    return linear(x, weight, w_scale, bias, threshold, counters)


@llm_int8.register_fake
def _(x, weight, w_scale, bias, threshold, counters) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx, inputs, output) -> None:
    _, weight, w_scale, bias, _, _ = inputs
    ctx.save_for_backward(weight, w_scale)
    ctx.bias_type = None if bias is None else bias.dtype


def _backward(ctx, grad: Tensor):
    weight, w_scale = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ naive.dequantize(weight, w_scale).to(grad.dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_type)
    return grad_x, None, None, grad_bias, None, None


llm_int8.register_autograd(_backward, setup_context=_setup_context)
