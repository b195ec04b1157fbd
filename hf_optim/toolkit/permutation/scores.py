"""Scores of stripes: the sum over rows of the ``keep`` largest of the ``group`` scores, which an N:M mask keeps.

If ``t`` is the ``keep``-th largest of a stripe without one of its columns, that column ``c`` adds ``max(c - t, 0)`` to
the kept sum in each row. Therefore a table of all stripes of a narrow matrix takes milliseconds, and each score is then
a look-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .splits import Splits, ascending_sets, binomials

TABLE_SETS = 2_000_000
"""The largest table: all sets of 4 of 84 columns."""

TABLE_WORK = 2_000_000_000
"""Upper limit on the work for a table: sets times rows."""

ROWS = 256
"""Rows from which a table is computed at once, to bound the memory."""


class Scorer(Protocol):
    """Computes the kept sums of stripes."""

    def stripe(self, columns: Tensor) -> Tensor:
        """Return the kept sums of stripes: columns ``[n, group]`` int64 -> ``[n]``."""
        ...

    def best(self, columns: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        """Return kept sum and index of the best split of ``[n, stripes · group]`` columns, each row ascending."""
        ...


def largest(values: Sequence[Tensor], keep: int) -> list[Tensor]:
    """Return the ``keep`` elementwise largest of tensors of one shape, in descending order."""
    found: list[Tensor] = []
    for value in values:
        rest = value
        for place, known in enumerate(found):
            found[place], rest = torch.maximum(known, rest), torch.minimum(known, rest)
        if len(found) < keep:
            found.append(rest)
    return found


def kept_score(values: Tensor, keep: int) -> Tensor:
    """Sum the ``keep`` largest along dimension -2, and along dimension -1: ``[..., group, rows]`` -> ``[...]``."""
    return torch.stack(largest(values.unbind(-2), keep)).sum((0, -1)) if keep else values.new_zeros(values.shape[:-2])


def has_table(width: int, rows: int, group: int) -> bool:
    """Return True if the table of all stripes of a matrix is small enough."""
    sets = math.comb(width, group)
    return sets <= TABLE_SETS and sets * rows <= TABLE_WORK


class TableScorer:
    """Scores of all possible stripes of a narrow matrix, in a table.

    Args:
        scores: ``[columns, rows]``, non-negative.
        keep: columns kept of each stripe.
        group: columns of a stripe.
    """

    def __init__(self, scores: Tensor, keep: int, group: int) -> None:
        self.group = group
        self.binomials = binomials(scores.shape[0], group).to(scores.device)
        self.kept = table_of(scores, keep, group)

    def stripe(self, columns: Tensor) -> Tensor:
        places = self.binomials[torch.arange(self.group, device=columns.device), columns.sort(1).values]
        return self.kept[places.sum(1)]

    def best(self, columns: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        room = 2**20 if columns.device.type == "cpu" else 2**26
        found = [self._best(part, splits) for part in columns.split(max(1, room // len(splits.ways)))]
        return torch.cat([kept for kept, _ in found]), torch.cat([way for _, way in found])

    def _best(self, columns: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        places = self.binomials[:, columns.T]  # [group, positions, n]
        rank = sum(places[k].index_select(0, splits.subsets[:, k]) for k in range(self.group))
        return _best_way(self.kept[rank], splits)


def table_of(scores: Tensor, keep: int, group: int) -> Tensor:
    """Return the kept sum of every set of ``group`` columns, ``[sets]``, in the order of ``ascending_sets``."""
    return torch.stack([_table_of(part, keep, group) for part in scores.split(ROWS, 1)]).sum(0)


def _table_of(scores: Tensor, keep: int, group: int) -> Tensor:
    width = scores.shape[0]
    if keep == group:
        return scores.sum(1)[ascending_sets(width, group).to(scores.device)].sum(1)
    sets = ascending_sets(width, group - 1).to(scores.device)
    parts = [scores[sets[:, k]] for k in range(group - 1)]
    best = largest(parts, keep)
    base, threshold = torch.stack([value.sum(1) for value in best]).sum(0), best[-1]
    chunk = max(1, 2**18 // scores.shape[1]) if scores.device.type == "cpu" else 2**26 // scores.shape[1] + 1
    made = []
    for column in range(group - 1, width):
        count = math.comb(column, group - 1)
        for start in range(0, count, chunk):
            end = min(count, start + chunk)
            made.append(base[start:end] + (scores[column] - threshold[start:end]).clamp_(min=0).sum(1))
    return torch.cat(made)


class DirectScorer:
    """Scores computed from the matrix on demand, for matrices too wide for a table; arguments as ``TableScorer``."""

    def __init__(self, scores: Tensor, keep: int, group: int) -> None:
        self.scores, self.keep, self.group = scores, keep, group
        self.room = 2**17 if scores.device.type == "cpu" else 2**28

    def stripe(self, columns: Tensor) -> Tensor:
        chunk = max(1, self.room // (self.group * self.scores.shape[1]))
        return torch.cat([kept_score(self.scores[part], self.keep) for part in columns.split(chunk)])

    def best(self, columns: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        chunk = max(1, self.room // (len(splits.subsets) * self.scores.shape[1]))
        found = [self._best(part, splits) for part in columns.split(chunk)]
        return torch.cat([kept for kept, _ in found]), torch.cat([way for _, way in found])

    def _best(self, columns: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
        values = self.scores[columns]  # [n, positions, rows]
        if (self.keep, self.group) == (2, 4):
            return _best_way(_two_of_four(values, splits.subsets).T, splits)
        kept = [kept_score(values[:, subset], self.keep) for subset in splits.subsets]
        return _best_way(torch.stack(kept), splits)


def _two_of_four(values: Tensor, subsets: Tensor) -> Tensor:
    """Return the kept sums for 2:4, ``[n, sets]``: the two largest of four are the larger of each half, or one half.

    ``values`` is ``[n, positions, rows]``, ``subsets`` ``[sets, 4]``.
    """
    positions = values.shape[1]
    first, second = torch.combinations(torch.arange(positions, device=values.device)).unbind(1)
    number = torch.zeros((positions, positions), dtype=torch.int64, device=values.device)
    number[first, second] = torch.arange(len(first), device=values.device)
    left, right = number[subsets[:, 0], subsets[:, 1]], number[subsets[:, 2], subsets[:, 3]]
    one, two = values[:, first], values[:, second]
    larger, both = torch.maximum(one, two), one + two
    crossed = larger[:, left] + larger[:, right]
    return torch.maximum(crossed, torch.maximum(both[:, left], both[:, right])).sum(-1)


def _best_way(kept: Tensor, splits: Splits) -> tuple[Tensor, Tensor]:
    """Return the best split for each of n: kept ``[sets, n]`` -> its kept sum ``[n]``, and its index ``[n]``.

    The splits come in blocks with the same first set, so the best of the other sets is found block by block.
    """
    ways, count = splits.ways, kept.shape[1]
    others = kept.index_select(0, ways[:, 1])
    for place in range(2, ways.shape[1]):
        others += kept.index_select(0, ways[:, place])
    others = others.view(-1, splits.block, count)
    best, first = (others.amax(1) + kept.index_select(0, ways[:: splits.block, 0])).max(0)
    within = others[first, :, torch.arange(count, device=kept.device)].argmax(1)
    return best, first * splits.block + within
