"""The operators of experts (see ``naive``). Importing this module registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations, so that graphs with them compile without a break.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import Route


def find_route(experts: Tensor, count: int, block: int) -> Route:
    """Return ``naive.route``: by the operator while compiling, past PyTorch's dispatcher otherwise."""
    if torch.compiler.is_compiling():
        return Route(*torch.ops.hf_optim.experts_route(experts, count, block))
    return _route(experts, count, block)


def _route(experts: Tensor, count: int, block: int) -> Route:
    if not can_run_triton(experts):
        return naive.route(experts, count, block)
    from . import routing

    return routing.route(experts.contiguous(), count, block)


@torch.library.custom_op("hf_optim::experts_route", mutates_args=())
def experts_route(experts: Tensor, count: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, offsets and blocks of ``naive.Route``; arguments as of ``naive.route``."""
    return tuple(_route(experts, count, block))


@experts_route.register_fake
def _(experts, count, block) -> tuple[Tensor, Tensor, Tensor]:
    number = lambda *shape: experts.new_empty(shape, dtype=torch.int32)  # noqa: E731
    pairs = experts.shape[0] * experts.shape[1]
    return number(pairs), number(count + 1), number(_most_blocks(pairs, count, block), 2)


def _most_blocks(pairs, count, block):
    # A symbolic number of pairs has no min() without a guard.
    return (pairs + torch.sym_min(count, pairs) * (block - 1)) // block
