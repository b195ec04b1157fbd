"""Exchanges of two columns: the cheap search for wide matrices, and for groups with too many splits.

Let one column of every stripe be free, and ``t_i`` the ``keep``-th largest of the rest of stripe i. Then column c adds
``a_ic = Σ_rows max(c - t_i, 0)`` to the kept sum of stripe i, and exchanging the free columns of i and j gains::

    a_ij + a_ji - a_ii - a_jj,        2 a_ic = ‖c - t_i‖₁ + Σ c - Σ t_i

One matrix of L1 distances therefore gives the gain of every exchange. Exchanges that share no stripe are applied at
once, best first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .scores import DirectScorer, Scorer, largest
from .splits import all_splits

GAIN = 1e-6
"""Smaller relative gains are attributed to rounding."""


def exchange_columns_(
    order: Tensor, scores: Tensor, keep: int, generator: torch.Generator, rounds: int = 400, least: float = 1e-5
) -> Tensor:
    """Exchange columns between stripes in place, one random column per stripe in each round, while it pays.

    Args:
        order: ``[stripes, group]`` int64.
        scores: ``[columns, rows]``, non-negative.
        keep: columns kept of each stripe, fewer than ``group``.
        generator: of the random columns.
        rounds: upper limit.
        least: stop once the relative gain of the last ``group²`` rounds (at least 8) is not above this.
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
    """Put ``columns [n, 2, group]`` into ``stripes [n, 2]``, in place, for the pairs that then keep more."""
    if not len(stripes):
        return
    after = scorer.stripe(columns.flatten(0, 1)).view(stripes.shape)
    before = kept[stripes].sum(1)
    better = after.sum(1) - before > GAIN * before
    order[stripes[better]] = columns[better]
    kept[stripes[better]] = after[better]


def swap_gains(order: Tensor, slots: Tensor, scores: Tensor, keep: int) -> Tensor:
    """Return the gain of exchanging the columns at ``slots`` ``[stripes]`` of two stripes: ``[stripes, stripes]``."""
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
    """Return the disjoint pairs with a positive gain that a greedy choice, best first, would take.

    ``gains`` is symmetric, ``[n, n]``. A pair is taken if each is the best partner of the other, which holds for the
    best pair of all.
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
    """Apply the best split of two stripes to random pairs that cover all stripes in each round, in place.

    ``order`` is ``[stripes, group]``. Stops once the relative gain of 8 rounds is not above ``least``, or after
    ``rounds``.
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
