"""The operator ``hf_optim::llm_int8`` (see ``naive``). Importing this module registers it.

On a CUDA device it runs the Triton kernels, without waiting for the device; on a CPU PyTorch's integer product (or,
under ``TRITON_INTERPRET=1``, the kernels interpreted). The gradient of ``x`` passes the quantization straight through.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..w8a8.op import on_triton
from . import cpu, naive
from .naive import PackedTensors


def linear(x: Tensor, weight: PackedTensors, threshold: float) -> Tensor:
    """Return ``torch.ops.hf_optim.llm_int8`` of ``x`` [..., in] without PyTorch's dispatch, and without a gradient."""
    if on_triton(x, x.dtype):
        from . import launch

        return launch.llm_int8(x, weight, threshold)
    return cpu.llm_int8(x, weight.weight, weight.scale, weight.bias, threshold)


@torch.library.custom_op("hf_optim::llm_int8", mutates_args=())
def llm_int8(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor
) -> Tensor:  # fmt: skip
    """Return ``x W^T + bias`` with outlier columns of ``x`` multiplied in its own dtype.

    Args:
        x: [..., in], floating point.
        threshold: columns with a larger magnitude are outliers: with 0 all of them, with infinity none.
        counters: the split-k semaphores.
        weight, w_scale, bias: see ``naive.PackedTensors``, as for the semaphores.
    """
    return linear(x, PackedTensors(weight, w_scale, bias, counters), threshold)


@llm_int8.register_fake
def _(x, weight, *_) -> Tensor:
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
