"""Search for an order of the columns of a matrix in which an N:M mask along the rows keeps more.

The mask keeps the ``keep`` largest of every ``group`` consecutive scores of a row, so the sum of kept scores depends on
which columns share a group. Pool & Yu ("Channel Permutations for N:M Sparsity", NeurIPS 2021) maximize this sum; how
thorough the search is depends on the width:

- narrow (the scores of all possible stripes fit in a table: 84 columns for groups of 4): every split of two stripes, or
  of three, best gain first, from many starts at once, then regressions;
- up to 256 stripes: exchanges of two columns, then every split of all pairs of stripes, then regressions;
- wider, or groups with too many splits: exchanges, then splits of random pairs unless there are too many.

The paper compares an order with row-wise sparsity without groups (half of each row for 2:4)::

    efficacy = (kept after - kept before) / (kept row-wise - kept before)
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
"""The largest number of stripes of which all pairs are scored."""

REFINED = 4
"""Number of arrangements that enter the search over three stripes."""

SWAPS, BATCH = 6, 50
"""With a table: pairs of columns that a regression exchanges, and regressions per batch."""

REGRESSION_WORK = {"cpu": 10**9, "cuda": 10**11}
"""Without a table: upper limit on the scores computed for all regressions. Each exchanges one pair of columns and costs
about ``6 · stripes · sets · rows`` scores."""


@dataclass(frozen=True, eq=False)
class PermutationResult:
    """An order of columns, and the sums of kept scores.

    Attributes:
        order: ``[columns]`` int64 on the CPU: column j of the new order is column ``order[j]`` of the old one.
        before, after: sum of the scores that the mask keeps in the old and in the new order.
        row_wise: the same sum if the share of each row is kept without groups; an upper bound on ``after``.
    """

    order: Tensor
    before: float
    after: float
    row_wise: float

    @property
    def efficacy(self) -> float:
        """Return the share of the loss due to groups that the order recovers; 0 if there is no loss."""
        lost = self.row_wise - self.before
        return (self.after - self.before) / lost if lost > 0 else 0.0


def kept_sum(scores: Tensor, keep: int, group: int) -> float:
    """Return the sum of the non-negative scores ``[rows, columns]`` that an N:M mask keeps."""
    best = largest(scores.unflatten(-1, (-1, group)).unbind(-1), keep)
    return float(sum(part.sum(dtype=torch.float64) for part in best))


def kept_sum_row_wise(scores: Tensor, keep: int, group: int) -> float:
    """Return the sum of scores if each row keeps ``keep / group`` of them without groups, the bound for any order."""
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
    """Search for the best order of columns, deterministically for a seed. The result never keeps less than before.

    Args:
        scores: ``[rows, columns]``, compared by absolute value; on any device.
        keep, group: the mask, 2:4 by default. ``columns`` must be a multiple of ``group``.
        stripes: stripes that are split at once, 2 or 3; three only with a table.
        tries: number of regressions; fewer if they are costly (``REGRESSION_WORK``), and none if not all pairs of
            stripes are scored.
        starts: with a table, number of orders from which the greedy phase starts: the given one and random ones.
        seed: seed of the random choices.

    Raises:
        ValueError: the width is not a multiple of ``group``, or the pattern is invalid.
    """
    rows, columns = scores.shape
    if not 0 < keep <= group:
        raise ValueError(f"{keep}:{group} is not a pattern: 1 <= keep <= group")
    if columns % group:
        raise ValueError(f"{columns} columns are not a multiple of the group size {group}")
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
    """One search; ``scores`` is ``[columns, rows]``, non-negative, and the rest as in ``search_permutation``."""

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
            best = converge_(best.concat(pool), table, self.stripes)
        return best.best(1).order
