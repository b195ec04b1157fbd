"""The operators of experts (see ``naive``). Importing this module registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations, so that graphs with them compile without a break. Nothing waits
for the host. They have no gradient; ``training_mixture`` is the layer with gradients.

Each function here runs its operator while ``torch.compile`` traces, and otherwise the kernels past the dispatcher,
which costs more than a decoding step of a small layer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import Gate as Gate
from .naive import Route
from .naive import Weights as Weights
from .naive import block_rows as block_rows
from .training_op import training_mixture as training_mixture

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(hidden: Tensor, up: Tensor, down: Tensor) -> str | None:
    """Return why the operators do not take these tensors; None if they do."""
    if up.dtype not in DTYPES or down.dtype != up.dtype:
        return f"{up.dtype} and {down.dtype} matrices"
    if hidden.dtype not in DTYPES:
        return f"{hidden.dtype} inputs"
    if up.device != hidden.device or down.device != hidden.device:
        return "matrices on another device"
    if hidden.is_cuda and torch.cuda.get_device_capability(hidden.device) < (8, 0):
        return "a compute capability below 8.0"
    return None


def mixture(hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate) -> Tensor:
    """Return ``naive.mixture``."""
    if torch.compiler.is_compiling():
        return torch.ops.hf_optim.experts_mixture(hidden, experts, weights, *given, *gate)
    return _mixture(hidden, experts, weights, given, gate)


def find_route(experts: Tensor, count: int, block: int) -> Route:
    """Return ``naive.route``."""
    if torch.compiler.is_compiling():
        return Route(*torch.ops.hf_optim.experts_route(experts, count, block))
    return _route(experts, count, block)


def rows_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, found: Route, top_k: int, by_pair: bool, block: int
) -> Tensor:  # fmt: skip
    """Return ``naive.rows_product``."""
    if torch.compiler.is_compiling():
        return torch.ops.hf_optim.experts_rows(x, weight, bias, *found, top_k, by_pair, block)
    return _rows_product(x, weight, bias, found, top_k, by_pair, block)


def combine(rows: Tensor, experts: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``naive.combine``."""
    if torch.compiler.is_compiling():
        return torch.ops.hf_optim.experts_combine(rows, experts, weights, count, dtype)
    return _combine(rows, experts, weights, count, dtype)


def _mixture(hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate) -> Tensor:
    if not can_run_triton(hidden):
        return naive.mixture(hidden, experts, weights, given, gate)
    from . import launch

    up_bias, down_bias = (None if b is None else b.contiguous() for b in (given.up_bias, given.down_bias))
    given = Weights(given.up, given.down, up_bias, down_bias, given.transposed)
    return launch.mixture(hidden.contiguous(), experts.contiguous(), weights.contiguous(), given, gate)


def _route(experts: Tensor, count: int, block: int) -> Route:
    if not can_run_triton(experts):
        return naive.route(experts, count, block)
    from . import routing

    return routing.route(experts.contiguous(), count, block)


def _rows_product(
    x: Tensor, weight: Tensor, bias: Tensor | None, found: Route, top_k: int, by_pair: bool, block: int
) -> Tensor:  # fmt: skip
    if not can_run_triton(x):
        return naive.rows_product(x, weight, bias, found, top_k, by_pair, block)
    from . import launch

    bias = None if bias is None else bias.contiguous()
    return launch.rows_product(x if x.stride(-1) == 1 else x.contiguous(), weight, bias, found, top_k, by_pair, block)


def _combine(rows: Tensor, experts: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    if not can_run_triton(rows):
        return naive.combine(rows, experts, weights, count, dtype)
    from . import launch

    return launch.combine(rows.contiguous(), experts.contiguous(), weights.contiguous(), count, dtype)


@torch.library.custom_op("hf_optim::experts_mixture", mutates_args=())
def experts_mixture(
    hidden: Tensor, experts: Tensor, weights: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None,
    down_bias: Tensor | None, transposed: bool, layout: int, act: int, alpha: float, offset: float, limit: float,
) -> Tensor:  # fmt: skip
    """Return ``naive.mixture``: ``[T, d]``. Arguments as of ``naive.Weights`` and ``naive.Gate``."""
    given = Weights(up, down, up_bias, down_bias, transposed)
    return _mixture(hidden, experts, weights, given, Gate(layout, act, alpha, offset, limit))


@experts_mixture.register_fake
def _(hidden, *_) -> Tensor:
    return hidden.new_empty(hidden.shape)


@torch.library.custom_op("hf_optim::experts_route", mutates_args=())
def experts_route(experts: Tensor, count: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return order, offsets and blocks of ``naive.Route``; arguments as of ``naive.route``."""
    order, offsets, blocks = _route(experts, count, block)
    return order, offsets, blocks


@experts_route.register_fake
def _(experts, count, block) -> tuple[Tensor, Tensor, Tensor]:
    number = lambda *shape: experts.new_empty(shape, dtype=torch.int32)  # noqa: E731
    pairs = experts.shape[0] * experts.shape[1]
    # A symbolic number of pairs has no min() without a guard.
    entries = (pairs + torch.sym_min(count, pairs) * (block - 1)) // block
    return number(pairs), number(count + 1), number(entries, 2)


@torch.library.custom_op("hf_optim::experts_rows", mutates_args=())
def experts_rows(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, offsets: Tensor, blocks: Tensor, top_k: int,
    by_pair: bool, block: int,
) -> Tensor:  # fmt: skip
    """Return ``naive.rows_product``: ``[T k, out]``."""
    return _rows_product(x, weight, bias, Route(order, offsets, blocks), top_k, by_pair, block)


@experts_rows.register_fake
def _(x, weight, bias, order, *_) -> Tensor:
    return x.new_empty((order.shape[0], weight.shape[1]))


@torch.library.custom_op("hf_optim::experts_combine", mutates_args=())
def experts_combine(rows: Tensor, experts: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``naive.combine``: ``[T, d]``."""
    return _combine(rows, experts, weights, count, dtype)


@experts_combine.register_fake
def _(rows, experts, weights, count, dtype) -> Tensor:
    return rows.new_empty((experts.shape[0], rows.shape[1]), dtype=dtype)
