"""The operators ``hf_optim::packed_experts`` and ``hf_optim::packed_expert_linear`` (see ``naive``).

Importing this module registers them. On a CUDA device they run the Triton kernels where these read the weight,
otherwise the specification (and, under ``TRITON_INTERPRET=1``, the interpreted kernels). They have fake
implementations, so that graphs with them compile without a break. ``packed_expert_linear`` has a gradient with respect
to its input, for which the chosen experts are decoded again, one at a time: a graph holds packed weights only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import StackedWeight

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def compute(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: StackedWeight, down: StackedWeight, counters: Tensor
) -> Tensor:  # fmt: skip
    """Return ``naive.packed_experts`` without PyTorch's dispatch, and without a gradient."""
    if _can_launch(hidden):
        from . import launch

        if launch.reads(up) and launch.reads(down):
            return launch.packed_experts(hidden, experts, weights, up, down, counters)
    return naive.packed_experts(hidden, experts, weights, up, down)


def _can_launch(x: Tensor) -> bool:
    return x.dtype in DTYPES and can_run_triton(x)


def _linear(x: Tensor, experts: Tensor, weight: StackedWeight, counters: Tensor) -> Tensor:
    if _can_launch(x):
        from . import launch

        if launch.reads(weight):
            return launch.expert_linear(x, experts, weight, counters)
    return naive.expert_linear(x, experts, weight)


def expert_linear(x: Tensor, experts: Tensor, weight: StackedWeight, counters: Tensor) -> Tensor:
    """Return ``naive.expert_linear``: by the operator where a graph is made, past PyTorch's dispatcher otherwise."""
    if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
        return torch.ops.hf_optim.packed_expert_linear(x, experts, *weight, counters)
    return _linear(x, experts, weight, counters)


@torch.library.custom_op("hf_optim::packed_experts", mutates_args=())
def packed_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor,
    up_packed: Tensor, up_scale: Tensor, up_zero: Tensor | None, up_width: int, up_group: int,
    down_packed: Tensor, down_scale: Tensor, down_zero: Tensor | None, down_width: int, down_group: int,
    counters: Tensor, up_format: int = 0, up_divisor: Tensor | None = None, down_format: int = 0,
    down_divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the output [T, d] of experts with a SiLU gate and inputs as they are; see ``naive.packed_experts``.

    Args:
        hidden: [T, d], float16, bfloat16 or float32.
        experts, weights: [T, k].
        counters: the split-k semaphores, int32, ``base.SEMAPHORES`` of them; zeros before and after.
        up_packed, down_packed and the others: see ``naive.StackedWeight``.
    """
    inner = up_scale.shape[2] // 2
    up = StackedWeight(
        up_packed, up_scale, up_zero, None, None, None, up_width, up_group, hidden.shape[1], 0, up_format, up_divisor
    )  # fmt: skip
    down = StackedWeight(
        down_packed, down_scale, down_zero, None, None, None, down_width, down_group, inner, 0, down_format,
        down_divisor,
    )  # fmt: skip
    return compute(hidden, experts, weights, up, down, counters)


@packed_experts.register_fake
def _(hidden, *_) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op("hf_optim::packed_expert_linear", mutates_args=())
def packed_expert_linear(
    x: Tensor, experts: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None,
    input_scale: Tensor | None, input_zero: Tensor | None, width: int, group_size: int, columns: int, inputs: int,
    format: int, divisor: Tensor | None, counters: Tensor,
) -> Tensor:  # fmt: skip
    """Return the product of each pair, [T k, out]; see ``naive.expert_linear`` and ``naive.StackedWeight``."""
    weight = StackedWeight(
        packed, scale, zero, order, input_scale, input_zero, width, group_size, columns, inputs, format, divisor
    )  # fmt: skip
    return _linear(x, experts, weight, counters)


@packed_expert_linear.register_fake
def _(x, experts, packed, scale, *_) -> Tensor:
    return x.new_empty((experts.shape[0] * experts.shape[1], scale.shape[2]))


@torch.library.custom_op("hf_optim::packed_expert_linear_grad", mutates_args=())
def packed_expert_linear_grad(
    grad: Tensor, experts: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, order: Tensor | None, width: int,
    group_size: int, columns: int, format: int = 0, divisor: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the gradient of each pair's input, [T k, in]; see ``naive.expert_linear_grad``."""
    weight = StackedWeight(packed, scale, zero, order, None, None, width, group_size, columns, 0, format, divisor)
    return naive.expert_linear_grad(grad, experts, weight)


@packed_expert_linear_grad.register_fake
def _(grad, experts, packed, scale, zero, order, width, group_size, columns, *_) -> Tensor:
    return grad.new_empty((grad.shape[0], columns))


def _setup_context(ctx, inputs, output) -> None:
    x, experts, packed, scale, zero, order, _, _, width, group_size, columns, _, format, divisor, _ = inputs
    optional = (zero, order, divisor)
    ctx.optional = [each is not None for each in optional]
    ctx.save_for_backward(experts, packed, scale, *(each for each in optional if each is not None))
    ctx.numbers, ctx.rows = (width, group_size, columns, format), x.shape[0]


def _backward(ctx, grad: Tensor):
    experts, packed, scale, *rest = ctx.saved_tensors
    zero, order, divisor = (rest.pop(0) if held else None for held in ctx.optional)
    own = torch.ops.hf_optim.packed_expert_linear_grad(grad, experts, packed, scale, zero, order, *ctx.numbers, divisor)
    if ctx.rows != own.shape[0]:
        own = own.view(ctx.rows, -1, own.shape[1]).sum(1)
    return own, *(None,) * 14


packed_expert_linear.register_autograd(_backward, setup_context=_setup_context)
