"""Exchanges of two columns, the cheap search for wide matrices and for groups too large to split in every way.

Let one column of every stripe be free, and ``t_i`` the ``keep``-th largest of what remains of stripe i. Then column c
is worth ``a_ic = Σ_rows max(c - t_i, 0)`` there, and exchanging the free columns of stripes i and j gains ::

    a_ij + a_ji - a_ii - a_jj,        2 a_ic = ‖c - t_i‖₁ + Σ c - Σ t_i

One matrix of L1 distances therefore gives the gain of every exchange, and those that share no stripe are made at once,
the best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import DirectScorer, Scorer, largest
from .splits import all_splits

GAIN = 1e-6
"""A gain below this share of what two stripes keep is rounding."""


def exchange_columns_(
    order: Tensor, scores: Tensor, keep: int, generator: torch.Generator, rounds: int = 400, least: float = 1e-5
) -> Tensor:
    """Exchange columns between stripes, in place, a random one of each stripe a round, until it is no longer worth it.

    Args:
        order: ``[stripes, group]`` int64.
        scores: ``[columns, rows]``, not negative.
        keep: kept of each stripe; less than the group.
        rounds: at most.
        least: stop when as many rounds as there are pairs of places in two stripes gain less than this share.
    """
    scorer = DirectScorer(scores, keep, order.shape[1])
    kept = scorer.stripe(order)
    patience = max(8, order.shape[1] ** 2)
    totals = [float(kept.double().sum())]
    for number in range(rounds):
        slots = torch.randint(order.shape[1], (len(order),), generator=generator).to(order.device)
        _exchange_round_(order, kept, slots, scores, keep, scorer)
        totals.append(float(kept.double().sum()))
        if number >= patience and totals[-1] - totals[-1 - patience] <= least * totals[-1]:
            break
    return order


def _exchange_round_(order: Tensor, kept: Tensor, slots: Tensor, scores: Tensor, keep: int, scorer: Scorer) -> None:
    every = torch.arange(len(order), device=order.device)
    first, second = disjoint_pairs(swap_gains(order, slots, scores, keep))
    one, two = order[first].clone(), order[second].clone()
    place = torch.arange(len(first), device=order.device)
    one[place, slots[first]], two[place, slots[second]] = order[second, slots[second]], order[first, slots[first]]
    keep_better_(order, kept, torch.stack([every[first], every[second]], 1), torch.stack([one, two], 1), scorer)


def keep_better_(order: Tensor, kept: Tensor, stripes: Tensor, columns: Tensor, scorer: Scorer) -> None:
    """Put ``columns [n, 2, group]`` into ``stripes [n, 2]`` where both together keep more than before."""
    if not len(stripes):
        return
    after = scorer.stripe(columns.flatten(0, 1)).view(stripes.shape)
    before = kept[stripes].sum(1)
    better = after.sum(1) - before > GAIN * before
    order[stripes[better]] = columns[better]
    kept[stripes[better]] = after[better]


def swap_gains(order: Tensor, slots: Tensor, scores: Tensor, keep: int) -> Tensor:
    """``[stripes, stripes]``: what exchanging the columns at ``slots`` ``[stripes]`` of two stripes gains."""
    every = torch.arange(len(order), device=order.device)
    free = order[every, slots]
    places = torch.arange(order.shape[1], device=order.device)
    others = order[places != slots[:, None]].view(len(order), -1)
    threshold = largest([scores[others[:, k]] for k in range(others.shape[1])], keep)[-1]
    columns = scores[free]
    worth = torch.cdist(threshold, columns, p=1.0)
    worth += columns.sum(1)
    worth -= threshold.sum(1)[:, None]
    own = worth.diagonal().clone()
    return (worth + worth.T - own - own[:, None]) / 2


def disjoint_pairs(gains: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs with a positive gain that share nothing, the best first: what the greedy choice would take.

    ``gains``: symmetric ``[n, n]``. A pair is taken when each is the other's best, which is so for the best of all.
    """
    gains = gains.clone().fill_diagonal_(0.0)
    every = torch.arange(len(gains), device=gains.device)
    first, second = [every[:0]], [every[:0]]
    while True:
        best, partner = gains.max(1)
        mutual = (best > 0) & (partner[partner] == every) & (every < partner)
        if not bool(mutual.any()):
            return torch.cat(first), torch.cat(second)
        first.append(every[mutual])
        second.append(partner[mutual])
        taken = torch.cat([first[-1], second[-1]])
        gains[taken] = 0.0
        gains[:, taken] = 0.0


def split_random_pairs_(
    order: Tensor, scorer: Scorer, generator: torch.Generator, rounds: int = 400, least: float = 1e-5
) -> Tensor:
    """Try every split of two stripes on random pairs of stripes, all stripes each round, in place.

    order: ``[stripes, group]``. Ends when ``8`` rounds gain less than the share ``least``, or after ``rounds``.
    """
    splits = all_splits(order.shape[1], 2).to(order.device)
    kept = scorer.stripe(order)
    totals = [float(kept.double().sum())]
    for number in range(rounds):
        pairs = torch.randperm(len(order), generator=generator)[: len(order) // 2 * 2].view(-1, 2).to(order.device)
        columns = order[pairs].flatten(1).sort(1).values
        _, way = scorer.best(columns, splits)
        places = splits.subsets[splits.ways[way]]
        moved = columns[torch.arange(len(columns), device=order.device)[:, None, None], places]
        keep_better_(order, kept, pairs, moved, scorer)
        totals.append(float(kept.double().sum()))
        if number >= 8 and totals[-1] - totals[-9] <= least * totals[-1]:
            break
    return order
