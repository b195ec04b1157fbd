"""The grouped product as one operator, which ``torch.compile`` does not look into, forwards or backwards.

The groups are read on the host, so it is not for steps that are captured on a device. transformers has such an operator
too, but 5.17 lets the compiler into its gradients, where it stops at the number of rows of a group.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("hf_optim::grouped_product", mutates_args=())
def opaque_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Return the product of ``grouped_product``, ``[S, out]``; rows behind the last group are 0.

    Args:
        rows: ``[S, in]``, sorted by group, of the dtype of ``weight``.
        weight: ``[E, in, out]``.
        ends: int32 ``[E]``: where each group ends.
    """
    out = rows.new_zeros(len(rows), weight.shape[2])
    for matrix, begin, end in _groups(ends):
        torch.mm(rows[begin:end], weight[matrix], out=out[begin:end])
    return out


@opaque_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@torch.library.custom_op("hf_optim::grouped_product_backward", mutates_args=())
def opaque_product_backward(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``rows`` and ``weight``; ``grad``: of the product, ``[S, out]``."""
    by_rows = rows.new_zeros(rows.shape)
    by_weight = weight.new_zeros(weight.shape)
    for matrix, begin, end in _groups(ends):
        torch.mm(grad[begin:end], weight[matrix].T, out=by_rows[begin:end])
        torch.mm(rows[begin:end].T, grad[begin:end], out=by_weight[matrix])
    return by_rows, by_weight


@opaque_product_backward.register_fake
def _(grad: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), weight.new_empty(weight.shape)


def _groups(ends: Tensor) -> list[tuple[int, int, int]]:
    """Return matrix, first row and end of each group that has rows."""
    stops = ends.tolist()
    spans = enumerate(zip([0, *stops], stops, strict=False))
    return [(matrix, begin, end) for matrix, (begin, end) in spans if end > begin]


def _setup(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    return *opaque_product_backward(grad, *ctx.saved_tensors), None


opaque_product.register_autograd(_backward, setup_context=_setup)
