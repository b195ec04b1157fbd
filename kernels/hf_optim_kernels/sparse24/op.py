"""The operator ``torch.ops.hf_optim.sparse24``: ``x W^T + bias`` with a compressed 2:4 weight (see ``naive``).

Importing this module registers it, and ``hf_optim::sparse24_weight``, the dense weight, for its gradient. On a CUDA
device they run the Triton kernels for inputs of 16 bits, else the specification (or, under ``TRITON_INTERPRET=1``, the
kernels interpreted). They have fake implementations, so graphs that hold them compile without a break, and ``sparse24``
has a gradient with respect to ``x`` and ``bias``.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import mma_layout, naive

DTYPES = (torch.bfloat16, torch.float16)


def on_kernel(x: Tensor, values: Tensor) -> bool:
    """Whether the Triton kernels serve inputs like ``x``: 16 bits, and weights of 16 bits of the same type."""
    fits = x.dtype in DTYPES and (not values.is_floating_point() or values.dtype == x.dtype)
    return fits and (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1")


def run(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    middle: int,
) -> Tensor:
    """The operator without PyTorch's dispatcher: no gradient, less work for the host."""
    stored, K = naive.shape_of(bits)[1], x.shape[-1]
    if (stored != K if mma_layout.holds(bits) else 4 * naive.stored_fours(K) != stored) or K % 4:
        raise ValueError(f"inputs of {K} columns for a weight of up to {stored}, in fours")
    if on_kernel(x, values):
        from .launch import sparse24 as kernels

        return kernels(x, values, bits, scale, zero, bias, counters, width, group_size, middle)
    return naive.sparse24(x, values, bits, scale, zero, bias, width, group_size, middle)


@torch.library.custom_op("hf_optim::sparse24", mutates_args=())
def sparse24(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    middle: int,
) -> Tensor:
    """``x W^T + bias``.

    Args:
        x: [..., in], floating point; ``in`` a multiple of 4.
        values: the two numbers of every four, made by ``naive.pack``; those of 16 bits have the type of the weight.
        bits: uint8 [out, fours / 2], made by ``naive.pack``; int32, as are ``values`` then, if ``fragments.pack`` made
            them (``width`` 4, whole tiles, groups that ``fragments.takes_groups``).
        scale: [groups, out], floating point; None for weights of 16 bits.
        zero: [groups, out], whole numbers in [0, 255]; None where it is ``middle``.
        bias: [out], or None.
        counters: int32, zeros, at least one for each tile of the output (``configs.COUNTERS`` are enough). They count
            while the operator runs and are zero again when it is done, which is why it is not said to write them.
            Two calls may not use the same ones at the same time: one layer, one stream.
        width: 16, or the bits of a stored code, 8 or 4.
        group_size: columns that share a scale, a multiple of 4; ``in`` or more for one scale a row.
        middle: the zero point where none is given.
    """
    return run(x, values, bits, scale, zero, bias, counters, width, group_size, middle)


@sparse24.register_fake
def _(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    middle: int,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], naive.shape_of(bits)[0]))


@torch.library.custom_op("hf_optim::sparse24_weight", mutates_args=())
def weight_of(
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    width: int,
    group_size: int,
    middle: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """The dense weight [out, in] in ``dtype``; arguments as in ``sparse24``."""
    if on_kernel(bits.new_empty(0, dtype=dtype), values):
        from .launch import decompress

        return decompress(values, bits, scale, zero, width, group_size, middle, columns, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    dense = naive.dequantize(values, bits, scale, zero, width, group_size, middle, columns, compute)
    return dense.to(dtype).contiguous()


@weight_of.register_fake
def _(
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    width: int,
    group_size: int,
    middle: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    return bits.new_empty((naive.shape_of(bits)[0], columns), dtype=dtype)


def _setup_context(ctx, inputs, output) -> None:
    x, values, bits, scale, zero, _, _, width, group_size, middle = inputs
    ctx.save_for_backward(values, bits, scale, zero)
    ctx.rest = (width, group_size, middle, x.shape[-1])


def _backward(ctx, grad: Tensor):
    values, bits, scale, zero = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ weight_of(values, bits, scale, zero, *ctx.rest, grad.dtype)
    if ctx.needs_input_grad[5]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, None, grad_bias, None, None, None, None


sparse24.register_autograd(_backward, setup_context=_setup_context)
