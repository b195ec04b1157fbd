"""The operator ``torch.ops.hf_optim.codebook_linear``: ``x W^T + bias`` with a weight of a codebook (see ``naive``).

Importing this module registers it. On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under
``TRITON_INTERPRET=1``, the kernels interpreted). It has a fake implementation, and a gradient with respect to ``x`` and
``bias``, for which the weight is decoded again.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import naive


def on_triton(x: Tensor) -> bool:
    """Whether the kernels run this input: on a CUDA device, or interpreted."""
    return x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"


@torch.library.custom_op("hf_optim::codebook_linear", mutates_args=())
def codebook_linear(
    x: Tensor,
    words: Tensor,
    table: Tensor,
    registers: Tensor,
    values: Tensor,
    columns: Tensor,
    owners: Tensor,
    starts: Tensor,
    bias: Tensor | None,
    counters: Tensor,
) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [..., in], float16, bfloat16 or float32.
        words: int16 [bits, chunks, out, plane], made by ``naive.pack``.
        table: [2^bits], the centroids in the type of ``x``.
        registers: int32 [8], made of 16-bit centroids by ``lookup.tables``; any where bits > 4 or ``x`` is float32.
        values: [outliers], row after row.
        columns: integers [outliers].
        owners: int32 [outliers], their rows.
        starts: int32 [out + 1], how many outliers stand before each row.
        bias: [out], or None.
        counters: int32, made by ``run.counters_for``; zeros before and after.
    """
    if on_triton(x):
        from .launch import codebook_linear as run

        return run(x, (words, table, registers, values, columns, owners, starts), bias, counters)
    return naive.codebook_linear(x, words, table, values, columns, starts, bias)


@codebook_linear.register_fake
def _(x, words, table, registers, values, columns, owners, starts, bias, counters) -> Tensor:
    return x.new_empty((*x.shape[:-1], words.shape[2]))


@torch.library.custom_op("hf_optim::codebook_dense", mutates_args=())
def codebook_dense(
    words: Tensor,
    table: Tensor,
    registers: Tensor,
    values: Tensor,
    columns: Tensor,
    owners: Tensor,
    starts: Tensor,
    width: int,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [out, in] in ``dtype``. Arguments as of ``codebook_linear``; ``width`` is ``in``."""
    if on_triton(words):
        from .launch import dense

        return dense((words, table, registers, values, columns, owners, starts), width, dtype)
    return naive.dequantize(words, table, values, columns, starts, width, dtype)


@codebook_dense.register_fake
def _(words, table, registers, values, columns, owners, starts, width, dtype) -> Tensor:
    return table.new_empty((words.shape[2], width), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, *held, _, _ = inputs
    ctx.save_for_backward(*held)
    ctx.width = x.shape[-1]


def _backward(ctx, grad: Tensor):
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ codebook_dense(*ctx.saved_tensors, ctx.width, grad.dtype)
    if ctx.needs_input_grad[8]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, *[None] * 7, grad_bias, None


codebook_linear.register_autograd(_backward, setup_context=_setup_context)
