"""The operator of a mixture layer with gradients: ``naive.mixture`` forward, ``naive_backward.gradients`` backward.

Importing this module registers it. On a CUDA device the Triton kernels run, on a CPU the specification. Both
directions have fake implementations, so that a training step compiles without a break, and nothing waits for the host.
A gradient of a gradient is not implemented: PyTorch says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive, naive_backward
from .naive import Gate, Route, Weights
from .naive_backward import Needs


def training_mixture(hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate) -> Tensor:
    """Return ``naive.mixture``, with gradients of ``hidden``, ``weights``, the matrices and the biases."""
    return torch.ops.hf_optim.experts_training(hidden, experts, weights, *given, *gate)[0]


@torch.library.custom_op("hf_optim::experts_training", mutates_args=())
def experts_training(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, transposed: bool, layout: int, act: int, alpha: float, offset: float, limit: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.mixture``, the first product, and order, offsets and blocks of the route.

    The first product is [T k, 2 I] ([T k, I]), of the dtype of the matrices, in the order of the route.
    """
    given, gate = _given(up, down, up_bias, down_bias, transposed), Gate(layout, act, alpha, offset, limit)
    top_k, first = experts.shape[1], given.matrices[0]
    if experts.numel() == 0 or not can_run_triton(hidden):
        block = naive.block_rows(experts.numel(), len(first))
        found = naive.route(experts, len(first), block)
        x = hidden.to(first.dtype)
        inner = naive.rows_product(x, first, given.up_bias, found, top_k or 1, False, block)
        return naive.mixture(hidden, experts, weights, given, gate), inner, *found
    from . import training

    out, inner, found = training.forward(
        hidden.contiguous(), experts.contiguous(), weights.contiguous(), given, gate
    )  # fmt: skip
    return out, inner, *found


@experts_training.register_fake
def _(hidden, experts, weights, up, down, up_bias, down_bias, transposed, layout, *_):
    count = down.shape[0]
    number = lambda *shape: hidden.new_empty(shape, dtype=torch.int32)  # noqa: E731
    pairs = experts.shape[0] * experts.shape[1]
    block = naive.block_rows(pairs, count)
    # A symbolic number of pairs has no min() without a guard.
    entries = (pairs + torch.sym_min(count, pairs) * (block - 1)) // block
    inner = up.new_empty((pairs, up.shape[2 if transposed else 1]))
    return hidden.new_empty(hidden.shape), inner, number(pairs), number(count + 1), number(entries, 2)


@torch.library.custom_op("hf_optim::experts_training_grad", mutates_args=())
def experts_training_grad(
    grad: Tensor, hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, transposed: bool, layout: int, act: int, alpha: float, offset: float, limit: float,
    inner: Tensor, order: Tensor, offsets: Tensor, blocks: Tensor, needs: list[bool],
) -> list[Tensor]:  # fmt: skip
    """Return the gradients of hidden, weights, up, down and the biases that are asked for, in this order.

    Args:
        grad: [T, d].
        inner, order, offsets, blocks: what ``experts_training`` returned.
        needs: which of the six.
    """
    given, gate = _given(up, down, up_bias, down_bias, transposed), Gate(layout, act, alpha, offset, limit)
    wanted, found = Needs(*needs), Route(order, offsets, blocks)
    if experts.numel() == 0 or not can_run_triton(hidden):
        made = naive_backward.gradients(grad, hidden, experts, weights, given, gate, inner, found, wanted)
    else:
        from . import training

        tensors = (grad.contiguous(), hidden.contiguous(), experts.contiguous(), weights.contiguous())
        made = training.backward(*tensors, given, gate, inner, found, wanted)
    return [one for one in made if one is not None]


@experts_training_grad.register_fake
def _(grad, hidden, experts, weights, up, down, up_bias, down_bias, *rest):
    tensors = (hidden, weights, up, down, up_bias, down_bias)
    return [
        torch.empty(t.shape, dtype=t.dtype, device=t.device)
        for t, needed in zip(tensors, rest[-1], strict=True) if needed and t is not None
    ]  # fmt: skip


def _given(
    up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, transposed: bool
) -> Weights:  # fmt: skip
    biases = [None if b is None else b.contiguous() for b in (up_bias, down_bias)]
    return Weights(up, down, biases[0], biases[1], transposed)


def _setup_context(ctx, inputs, output) -> None:
    kept = output[1:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*kept)
    tensors, ctx.rest = inputs[:7], inputs[7:]
    ctx.save_for_backward(*tensors, *kept)


def _backward(ctx, grad, *_):
    nothing = (None,) * len(ctx.rest)
    if grad is None:
        return *(None,) * 7, *nothing
    saved = ctx.saved_tensors
    tensors, kept = saved[:7], saved[7:]
    asked = ctx.needs_input_grad
    needs = [asked[0], *asked[2:7]]
    made = iter(torch.ops.hf_optim.experts_training_grad(grad, *tensors, *ctx.rest, *kept, needs))
    hidden, *others = (next(made) if needed else None for needed in needs)
    return hidden, None, *others, *nothing


experts_training.register_autograd(_backward, setup_context=_setup_context)
