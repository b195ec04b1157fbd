"""The experts of a layer spread over ranks: tokens go to the ranks that hold their experts, and results come back.

It needs ``torch.distributed`` and no class of transformers, so it also serves versions without a door for exchanges.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ModelError
from ..distributed.exchange import plan_route
from ..distributed.grid import Grid

Compute = Callable[[Tensor, Tensor, Tensor], Tensor]
"""The experts of this rank: rows ``[R, d]``, their local numbers int64 ``[R, 1]``, and gates of one ``[R, 1]``."""


@dataclass(frozen=True, eq=False)
class Pairs:
    """The pairs of token and expert of one rank, sorted by expert.

    Attributes:
        tokens: int64 ``[P]``: the token of each pair that is computed.
        order: int64 ``[T k]``: the place of each pair before sorting; those of no expert are last.
        counts: int64 ``[E]``: pairs of each expert.
    """

    tokens: Tensor
    order: Tensor
    counts: Tensor

    @property
    def computed(self) -> int:
        """How many pairs an expert computes."""
        return len(self.tokens)


def pair_up(experts: Tensor, count: int) -> Pairs:
    """Return the pairs sorted by expert, equal ones in the order of tokens.

    experts: int64 ``[T, k]``, where ``count`` and above stand for "computed by none".
    """
    numbers, order = torch.sort(experts.reshape(-1), stable=True)
    ends = torch.searchsorted(numbers, torch.arange(count, device=numbers.device), right=True)
    counts = torch.diff(ends, prepend=ends.new_zeros(1))
    kept = order[: int(ends[-1])] if count and len(order) else order[:0]
    return Pairs(kept // experts.shape[1], order, counts)


def numbers_of(received: Tensor, total: int | None = None) -> Tensor:
    """Return the local number of the expert of each received row, int64 ``[R, 1]``, from counts ``[G, e]``.

    ``total``: R, if it is known; otherwise a device waits for the host.
    """
    numbers = torch.arange(received.shape[1], device=received.device).repeat(len(received))
    return numbers.repeat_interleave(received.reshape(-1), output_size=total).unsqueeze(-1)


def run_experts(compute: Compute, rows: Tensor, numbers: Tensor) -> Tensor:
    """Return what the experts of this rank give for rows ``[R, d]``; a rank without rows takes part in backward."""
    if len(rows):
        return compute(rows, numbers, rows.new_ones(numbers.shape))
    one = compute(rows.sum(dim=0, keepdim=True), numbers.new_zeros((1, 1)), rows.new_ones((1, 1)))
    return one[:0]


def combine(outputs: Tensor, pairs: Pairs, weights: Tensor) -> Tensor:
    """Return ``[T, d]``: for each token the sum of the outputs ``[P, d]`` of its pairs, times weights ``[T, k]``."""
    missing = len(pairs.order) - len(outputs)
    if missing:
        outputs = torch.cat([outputs, outputs.new_zeros(missing, outputs.shape[1])])
    back = torch.empty_like(pairs.order)
    back.scatter_(0, pairs.order, torch.arange(len(pairs.order), device=pairs.order.device))
    return (outputs[back].view(*weights.shape, outputs.shape[1]) * weights.unsqueeze(-1)).sum(dim=1)


def exchange_experts(
    hidden: Tensor, experts: Tensor, weights: Tensor, compute: Compute, own: int, grid: Grid
) -> Tensor:
    """Return the output of a mixture layer whose experts are spread over the ranks of a grid. Differentiable.

    Rank r holds the experts ``r * own`` to ``(r + 1) * own - 1``. Each rank has tokens of its own, possibly none; all
    ranks must call this. The order of the grid changes no bit of the result.

    Args:
        hidden: ``[T, d]``.
        experts: int64 ``[T, k]``, numbers among all experts; ``own * G`` and above stand for "computed by none".
        weights: ``[T, k]``.
        compute: the experts of this rank.
        own: experts per rank.
        grid: of the G ranks.

    Returns:
        ``[T, d]``. Raises ``RankError`` if a rank has ended or does not answer.
    """
    pairs = pair_up(experts, own * grid.size)
    route, received = plan_route(pairs.counts.view(grid.size, own), grid)
    outputs = run_experts(compute, route.forth(hidden[pairs.tokens]), numbers_of(received, route.received))
    return combine(route.back(outputs), pairs, weights)


def experts_per_rank(experts: int, ranks: int, what: str = "the model") -> int:
    """Return E / G. Raises ``ModelError`` unless the ranks divide the experts."""
    if experts % ranks:
        raise ModelError(f"{ranks} ranks do not divide the {experts} experts of {what}: choose ep_size accordingly")
    return experts // ranks
