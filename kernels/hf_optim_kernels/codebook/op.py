"""The operator ``torch.ops.hf_optim.codebook_linear``: ``x W^T + bias`` with a codebook weight (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the interpreted kernels). It has a fake implementation, and a gradient with respect to ``x`` and
``bias``, for which the weight is decoded again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import PackedTensors


def linear(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return the operator's result for ``x`` [..., in] without PyTorch's dispatch, and without a gradient."""
    if can_run_triton(x):
        from . import launch

        return launch.codebook_linear(x, weight)
    return naive.codebook_linear(x, weight)


@torch.library.custom_op("hf_optim::codebook_linear", mutates_args=())
def codebook_linear(
    x: Tensor, words: Tensor, table: Tensor, registers: Tensor, values: Tensor, columns: Tensor, owners: Tensor,
    starts: Tensor, bias: Tensor | None, counters: Tensor,
) -> Tensor:  # fmt: skip
    """Return ``x W^T + bias``: [..., out].

    Args:
        x: [..., in], float16, bfloat16 or float32.
        counters: the split-k semaphores, int32, made by ``launch.semaphores_for``; zeros before and after.
        words, table, registers, values, columns, owners, starts, bias: see ``naive.PackedTensors``.
    """
    return linear(x, PackedTensors(words, table, registers, values, columns, owners, starts, bias, counters))


@codebook_linear.register_fake
def _(x, words, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[2]))


@torch.library.custom_op("hf_optim::codebook_dense", mutates_args=())
def codebook_dense(
    words: Tensor, table: Tensor, registers: Tensor, values: Tensor, columns: Tensor, owners: Tensor, starts: Tensor,
    width: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the weight [out, in] in ``dtype``. Arguments as of ``codebook_linear``; ``width`` is ``in``."""
    weight = PackedTensors(words, table, registers, values, columns, owners, starts, None, None)
    if can_run_triton(words):
        from . import launch

        return launch.dense(weight, width, dtype)
    return naive.dequantize(weight, width, dtype)


@codebook_dense.register_fake
def _(words, table, registers, values, columns, owners, starts, width, dtype) -> Tensor:
    return table.new_empty((words.shape[2], width), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, *weight, _, _ = inputs
    ctx.save_for_backward(*weight)
    ctx.width = x.shape[-1]


def _backward(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ codebook_dense(*ctx.saved_tensors, ctx.width, grad.dtype)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, *[None] * 7, grad_bias, None


codebook_linear.register_autograd(_backward, setup_context=_setup_context)
