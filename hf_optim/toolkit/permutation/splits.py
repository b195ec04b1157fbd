"""Ways to split a few columns into stripes, and the place of a set of columns in a table of all sets.

A stripe is one N:M group of columns. Two stripes of 4 can be filled from their 8 columns in 35 ways, three from their
12 in 5775: neither the order inside a stripe nor the order of the stripes counts.
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
"""More splits than this are not tried one by one."""


@dataclass(frozen=True, eq=False)
class Splits:
    """All ways to fill ``stripes`` stripes of ``group`` from as many columns as they hold together.

    Attributes:
        subsets: ``[sets, group]`` int64: every set of positions that one stripe can hold, ascending in itself.
        ways: ``[splits, stripes]`` int64: the sets that make up each split. The first keeps the columns as they stand.
        block: how many splits in a row have the same first set.
    """

    subsets: Tensor
    ways: Tensor
    block: int

    def to(self, device: torch.device) -> Splits:
        return Splits(self.subsets.to(device), self.ways.to(device), self.block)


def split_count(group: int, stripes: int) -> int:
    """How many splits there are: ``(stripes · group)! / (group!^stripes · stripes!)``."""
    return math.factorial(group * stripes) // (math.factorial(group) ** stripes * math.factorial(stripes))


@lru_cache(maxsize=16)
def all_splits(group: int, stripes: int) -> Splits:
    """The splits of ``group · stripes`` columns. Raises ``ValueError`` where there are more than ``MAX_SPLITS``."""
    if split_count(group, stripes) > MAX_SPLITS:
        raise ValueError(f"{split_count(group, stripes)} splits of {stripes} stripes of {group} are too many to try")
    subsets = list(combinations(range(group * stripes), group))
    number = {subset: place for place, subset in enumerate(subsets)}
    ways = [[number[subset] for subset in way] for way in _ways(tuple(range(group * stripes)), group)]
    return Splits(torch.tensor(subsets), torch.tensor(ways), split_count(group, stripes - 1))


def _ways(left: tuple[int, ...], group: int) -> Iterator[list[tuple[int, ...]]]:
    """The first stripe holds the lowest position that is left, so that no split comes twice."""
    if not left:
        yield []
        return
    for others in combinations(left[1:], group - 1):
        for rest in _ways(tuple(p for p in left[1:] if p not in others), group):
            yield [(left[0], *others), *rest]


@lru_cache(maxsize=16)
def binomials(width: int, group: int) -> Tensor:
    """``[group, width]`` int64: ``C(column, k)`` for k = 1 .. group. Their sum over a set is its place in the table."""
    return torch.tensor([[math.comb(column, k) for column in range(width)] for k in range(1, group + 1)])


def ascending_sets(width: int, size: int) -> Tensor:
    """Every set of ``size`` of ``width`` columns, ``[C(width, size), size]``, ordered by largest column, then the next.

    In this order the sets of the first n columns come first, whatever n is.
    """
    sets = torch.arange(width)[:, None]
    for length in range(2, size + 1):
        fewer = [math.comb(largest, length - 1) for largest in range(width)]
        sets = torch.cat([torch.cat([sets[:n], torch.full((n, 1), i)], 1) for i, n in enumerate(fewer) if n])
    return sets
