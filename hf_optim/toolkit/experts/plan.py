"""The plan of a mixture layer: which pair of token and expert gets which slot of the expert. Pure functions of tensors.

Slots are given in this order: the first choices of all tokens, then their second choices, and so on; among equal
choices by position, or by priority, where equal priorities keep the order of positions. Sorting is stable and counting
uses no atomic operation, so equal inputs give equal plans. Nothing waits for an accelerator.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What a mixture layer computes for T tokens with k choices each.

    Attributes:
        experts: int64 ``[T, k]``; the number of experts stands for "computed by none".
        weights: ``[T, k]``, 0 where no expert computes.
        complete: True if every pair is computed, known without reading the tensors.
    """

    experts: Tensor
    weights: Tensor
    complete: bool


def ranks_among_equals(keys: Tensor) -> Tensor:
    """Return for each key how many equal keys stand before it. keys: int64 ``[n]``; returns int64 ``[n]``."""
    ordered, order = torch.sort(keys, stable=True)
    first = torch.searchsorted(ordered, ordered)
    ranks = torch.arange(len(keys), device=keys.device) - first
    return torch.empty_like(ranks).scatter_(0, order, ranks)


def slot_positions(
    experts: Tensor,
    counted: Tensor,
    num_experts: int,
    *,
    groups: Tensor | None = None,
    choices: Tensor | None = None,
    priority: Tensor | None = None,
) -> Tensor:
    """Return the slot that each pair takes of its expert, from 0.

    Args:
        experts: int64 ``[T, k]``, the chosen experts.
        counted: bool ``[T, k]``: pairs that take slots; not those of padding, and of experts of another rank.
        num_experts: E.
        groups: int64 ``[T]``: the group of each token; every group has slots of its own. None is one group.
        choices: ``[T, k]``: the gates by which the choices of a token are ordered, the largest first; None takes
            the order of the columns.
        priority: ``[T]``: the tokens with the largest are first; None takes their order.

    Returns:
        int64 ``[T, k]``, -1 for pairs that are not counted.
    """
    tokens, top_k = experts.shape
    keys = torch.where(counted, experts, num_experts)
    if groups is not None:
        keys = keys + groups[:, None] * (num_experts + 1)
    columns = None if choices is None else torch.argsort(choices, dim=1, descending=True, stable=True)
    if columns is not None:
        keys = keys.gather(1, columns)
    rows = None if priority is None else torch.argsort(priority, descending=True, stable=True)
    if rows is not None:
        keys = keys[rows]
    slots = ranks_among_equals(keys.t().reshape(-1)).view(top_k, tokens).t()
    if rows is not None:
        slots = torch.empty_like(slots).index_copy_(0, rows, slots)
    if columns is not None:
        slots = torch.empty_like(slots).scatter_(1, columns, slots)
    return torch.where(counted, slots, -1)


def renormalized(weights: Tensor, kept: Tensor) -> Tensor:
    """Return the gates of the kept pairs, scaled to the sum that all gates of the token had; 0 for the others.

    weights: ``[T, k]``; kept: bool ``[T, k]``. A token of which nothing is dropped keeps its gates to the bit, one of
    which everything is dropped has only zeros.
    """
    left = torch.where(kept, weights, 0)
    before, after = weights.sum(1, keepdim=True), left.sum(1, keepdim=True)
    return left * (before / torch.where(after == 0, 1, after))


def count_pairs(counts: Tensor, experts: Tensor, counted: Tensor, kept: Tensor | None) -> None:
    """Add to ``counts`` ``[2, E]`` the pairs ``[T, k]`` that chose each expert, and those of them that it dropped."""
    with torch.no_grad():
        numbers = experts.reshape(-1).clamp(0, counts.shape[1] - 1)
        counts[0].scatter_add_(0, numbers, counted.reshape(-1).to(counts.dtype))
        if kept is not None:
            counts[1].scatter_add_(0, numbers, (counted & ~kept).reshape(-1).to(counts.dtype))
