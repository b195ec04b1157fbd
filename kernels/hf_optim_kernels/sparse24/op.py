"""The operator ``torch.ops.hf_optim.sparse24``: ``x W^T + bias`` with a compressed 2:4 weight (see ``naive``).

Importing this module registers it, and ``hf_optim::sparse24_weight``, the dense weight, for its gradient. On a CUDA
device they run the Triton kernels for inputs of 16 bits, else the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations, so that graphs with them compile without a break, and ``sparse24``
has a gradient with respect to ``x`` and ``bias``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import mma_layout, naive
from .naive import PackedTensors

DTYPES = (torch.bfloat16, torch.float16)


def on_kernel(x: Tensor, values: Tensor) -> bool:
    """Return True if the Triton kernels support inputs like ``x``: 16 bits, and the dtype of weights of 16 bits."""
    fits = x.dtype in DTYPES and (not values.is_floating_point() or values.dtype == x.dtype)
    return fits and can_run_triton(x)


def linear(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return the operator's result for ``x`` [..., in] without PyTorch's dispatch, and without a gradient.

    Raises ``ValueError`` if the columns of ``x`` are not those of the weight.
    """
    bits = weight.bits
    stored, K = naive.shape_of(bits)[1], x.shape[-1]
    if (stored != K if mma_layout.holds(bits) else 4 * naive.stored_groups24(K) != stored) or K % 4:
        raise ValueError(f"inputs of {K} columns do not match a weight of up to {stored} columns in groups of four")
    if on_kernel(x, weight.values):
        from . import launch

        return launch.sparse24(x, weight)
    return naive.sparse24(x, weight)


@torch.library.custom_op("hf_optim::sparse24", mutates_args=())
def sparse24(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    counters: Tensor, width: int, group_size: int, middle: int,
) -> Tensor:  # fmt: skip
    """Return ``x W^T + bias``: [..., out].

    Args:
        x: [..., in], floating point; ``in`` is a multiple of 4.
        counters: the split-k semaphores.
        middle: the zero offset.
        values, bits, scale, zero, bias, width, group_size: see ``naive.PackedTensors``, as for those two.
    """
    return linear(x, PackedTensors(values, bits, scale, zero, bias, counters, width, group_size, middle))


@sparse24.register_fake
def _(x, values, bits, *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], naive.shape_of(bits)[0]))


@torch.library.custom_op("hf_optim::sparse24_weight", mutates_args=())
def weight_of(
    values: Tensor, bits: Tensor, scale: Tensor | None, zero: Tensor | None, width: int, group_size: int, middle: int,
    columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the dense weight [out, in] in ``dtype``; arguments as in ``sparse24``."""
    weight = PackedTensors(values, bits, scale, zero, None, None, width, group_size, middle)
    if on_kernel(bits.new_empty(0, dtype=dtype), values):
        from . import launch

        return launch.decompress(weight, columns, dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return naive.dequantize(weight, columns, compute).to(dtype).contiguous()


@weight_of.register_fake
def _(values, bits, scale, zero, width, group_size, middle, columns, dtype) -> Tensor:
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
