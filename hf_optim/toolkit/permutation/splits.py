"""Splits of a few columns into stripes, and the index of a set of columns in a table of all sets.

A stripe is one N:M group of columns. There are 35 ways to split 8 columns into two stripes of 4, and 5775 to split 12
into three: neither the order within a stripe nor the order of stripes matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations

import torch
from torch import Tensor

MAX_SPLITS = 6_000
"""The largest number of splits that are enumerated."""


@dataclass(frozen=True, eq=False)
class Splits:
    """All splits of ``stripes · group`` columns into ``stripes`` stripes.

    Attributes:
        subsets: ``[sets, group]`` int64: every set of positions that a stripe can have, each ascending.
        ways: ``[splits, stripes]`` int64: the sets of each split. The first split keeps the current order.
        block: number of consecutive splits with the same first set.
    """

    subsets: Tensor
    ways: Tensor
    block: int

    def to(self, device: torch.device) -> Splits:
        """Return the splits on ``device``."""
        return Splits(self.subsets.to(device), self.ways.to(device), self.block)


def split_count(group: int, stripes: int) -> int:
    """Return the number of splits: ``(stripes · group)! / (group!^stripes · stripes!)``."""
    return math.factorial(group * stripes) // (math.factorial(group) ** stripes * math.factorial(stripes))


@lru_cache(maxsize=16)
def all_splits(group: int, stripes: int) -> Splits:
    """Enumerate the splits of ``group · stripes`` columns. Raises ``ValueError`` for more than ``MAX_SPLITS``."""
    if split_count(group, stripes) > MAX_SPLITS:
        raise ValueError(f"{split_count(group, stripes)} splits of {stripes} stripes of {group} are too many to try")
    subsets = list(combinations(range(group * stripes), group))
    number = {subset: place for place, subset in enumerate(subsets)}
    ways = [[number[subset] for subset in way] for way in _ways(tuple(range(group * stripes)), group)]
    return Splits(torch.tensor(subsets), torch.tensor(ways), split_count(group, stripes - 1))


def _ways(left: tuple[int, ...], group: int) -> Iterator[list[tuple[int, ...]]]:
    """Yield all splits of ``left``. The first stripe takes the lowest position left, so that no split comes twice."""
    if not left:
        yield []
        return
    for others in combinations(left[1:], group - 1):
        for rest in _ways(tuple(p for p in left[1:] if p not in others), group):
            yield [(left[0], *others), *rest]


@lru_cache(maxsize=16)
def binomials(width: int, group: int) -> Tensor:
    """Return ``C(column, k)`` for k = 1 .. group, ``[group, width]`` int64; the sum over a set is its table index."""
    return torch.tensor([[math.comb(column, k) for column in range(width)] for k in range(1, group + 1)])


def ascending_sets(width: int, size: int) -> Tensor:
    """Return every set of ``size`` of ``width`` columns, ``[C(width, size), size]``, in colexicographic order.

    In this order the sets of the first n columns come first, for every n.
    """
    sets = torch.arange(width)[:, None]
    for length in range(2, size + 1):
        fewer = [math.comb(largest, length - 1) for largest in range(width)]
        sets = torch.cat([torch.cat([sets[:n], torch.full((n, 1), i)], 1) for i, n in enumerate(fewer) if n])
    return sets
