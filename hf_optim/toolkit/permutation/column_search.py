"""An order of a matrix's columns in which an N:M mask along the rows keeps more.

The mask keeps the ``keep`` largest of every ``group`` consecutive scores of a row, so what it keeps depends on which
columns stand together. The order that keeps most is sought (Pool & Yu, "Channel Permutations for N:M Sparsity",
NeurIPS 2021) where it can be afforded:

- narrow (the scores of all possible stripes fit in a table: 84 columns at groups of 4): every split of two stripes, or
  of three, best gain first, from many starts at once, then regressions;
- up to 256 stripes: exchanges of two columns, then every split of all pairs of stripes, then regressions;
- wider, or groups too large to split in every way: exchanges, then splits of random pairs where the group permits.

How good an order is, the paper measures against what could be had without groups, half of each row for 2:4::

    efficacy = (kept after - kept before) / (kept by rows - kept before)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .scores import DirectScorer, TableScorer, has_table, largest
from .splits import MAX_SPLITS, split_count
from .stripes import Stripes, converge_, escape
from .swaps import exchange_columns_, split_random_pairs_

MAX_STRIPES_ALL_PAIRS = 256
"""Stripes of which all pairs are looked at."""

REFINED = 4
"""Arrangements that go into the search over three stripes."""

SWAPS, BATCH = 6, 50
"""Pairs of columns that a regression exchanges, and regressions at once, where a table answers."""

REGRESSION_WORK = {"cpu": 10**9, "cuda": 10**11}
"""Without a table a regression exchanges one pair of columns, and there are no more than this many scores to compute
admit: about ``6 · stripes · sets · rows`` each."""


@dataclass(frozen=True, eq=False)
class PermutationResult:
    """An order of columns, and what it is worth.

    Attributes:
        order: ``[columns]`` int64 on the CPU: column j of the new order is column ``order[j]`` of the old one.
        before, after: what the mask keeps in the old and the new order.
        rows: what is kept if the same share of each row may stand anywhere.
    """

    order: Tensor
    before: float
    after: float
    rows: float

    @property
    def efficacy(self) -> float:
        """The share of what groups lose that the order brings back; 0 where they lose nothing."""
        return (self.after - self.before) / (self.rows - self.before) if self.rows > self.before else 0.0


def kept_sum(scores: Tensor, keep: int, group: int) -> float:
    """What an N:M mask keeps of non-negative scores ``[rows, columns]``."""
    best = largest(scores.unflatten(-1, (-1, group)).unbind(-1), keep)
    return float(sum(part.sum(dtype=torch.float64) for part in best))


def kept_sum_row_wise(scores: Tensor, keep: int, group: int) -> float:
    """What is kept if ``keep / group`` of each row may stand anywhere in it: no order of columns keeps more."""
    count = scores.shape[-1] * keep // group
    return float(scores.topk(count, dim=-1, sorted=False).values.sum(dtype=torch.float64))


@torch.no_grad()
def search_permutation(
    scores: Tensor,
    keep: int = 2,
    group: int = 4,
    *,
    stripes: int = 2,
    tries: int = 100,
    starts: int = 64,
    seed: int = 0,
) -> PermutationResult:
    """The best order of the columns found, deterministic for a seed. It never keeps less than the one given.

    Args:
        scores: ``[rows, columns]``, compared by absolute value; it may lie on a GPU.
        keep, group: the mask, 2:4 by default. ``columns`` must be a multiple of ``group``.
        stripes: how many stripes are split at once, 2 or 3; three only where there is a table.
        tries: how many regressions; fewer where they are costly (``REGRESSION_WORK``), and none where not all pairs of
            stripes are looked at.
        starts: from how many orders the greedy phase starts, the given one and random ones, where there is a table.
        seed: of the random choices.

    Raises ``ValueError`` for a width that does not divide, or a pattern that is none.
    """
    rows, columns = scores.shape
    if not 0 < keep <= group:
        raise ValueError(f"{keep}:{group} is no pattern: 1 <= keep <= group")
    if columns % group:
        raise ValueError(f"{columns} columns do not divide into groups of {group}")
    size = scores.detach().abs().float()
    if keep == group or columns == group or rows == 0:
        order = torch.arange(columns)
    else:
        generator = torch.Generator().manual_seed(seed)
        order = _Search(size.T.contiguous(), keep, group, stripes, tries, starts, generator).run().cpu()
    before = kept_sum(size, keep, group)
    after = kept_sum(size[:, order.to(size.device)], keep, group)
    if after <= before:
        order, after = torch.arange(columns), before
    return PermutationResult(order, before, after, kept_sum_row_wise(size, keep, group))


@dataclass(frozen=True, eq=False)
class _Search:
    """One search. ``scores``: ``[columns, rows]``, not negative."""

    scores: Tensor
    keep: int
    group: int
    stripes: int
    tries: int
    starts: int
    generator: torch.Generator

    def run(self) -> Tensor:
        width, rows = self.scores.shape
        start = torch.arange(width, device=self.scores.device).view(-1, self.group)
        if split_count(self.group, 2) > MAX_SPLITS:
            return exchange_columns_(start, self.scores, self.keep, self.generator).flatten()
        if has_table(width, rows, self.group):
            return self._with_table(TableScorer(self.scores, self.keep, self.group)).flatten()
        exchange_columns_(start, self.scores, self.keep, self.generator)
        direct = DirectScorer(self.scores, self.keep, self.group)
        if len(start) > MAX_STRIPES_ALL_PAIRS:
            return split_random_pairs_(start, direct, self.generator).flatten()
        found = converge_(Stripes.of(start[None], direct), direct, 2)
        each = 6 * len(start) * math.comb(2 * self.group, self.group) * rows
        tries = min(self.tries, REGRESSION_WORK.get(start.device.type, REGRESSION_WORK["cpu"]) // each)
        return escape(found, direct, tries, 1, 1, self.generator).order.flatten()

    def _with_table(self, table: TableScorer) -> Tensor:
        width = len(self.scores)
        shuffled = torch.rand((max(1, self.starts) - 1, width), generator=self.generator).argsort(1)
        orders = torch.cat([torch.arange(width)[None], shuffled]).to(self.scores.device)
        pool = converge_(Stripes.of(orders.unflatten(1, (-1, self.group)), table), table, 2).best(REFINED)
        best = escape(pool, table, self.tries, BATCH, SWAPS, self.generator)
        if self.stripes > 2 and split_count(self.group, self.stripes) <= MAX_SPLITS:
            best = converge_(best.joined(pool), table, self.stripes)
        return best.best(1).order
