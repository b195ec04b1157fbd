"""Stripe groups: try every way to divide the columns of two or three stripes among them, best gain first.

Pool & Yu (NeurIPS 2021): score all groups of stripes, and apply the split with the largest gain. Groups that share a
stripe with it wait; groups with a changed stripe are scored again, until there is no gain. A bounded number of
regressions escapes from this local optimum: random columns are exchanged, for the worse, and the search continues.

Several searches run at once as a batch; a regression is one more element of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .scores import Scorer
from .splits import all_splits

GAIN = 1e-6
"""Smaller relative gains are attributed to rounding."""


@dataclass(eq=False)
class Stripes:
    """A batch of arrangements of the same columns.

    Attributes:
        order: ``[batch, stripes, group]`` int64: the columns of each stripe.
        kept: ``[batch, stripes]``: sum of the scores that the mask keeps of each stripe.
    """

    order: Tensor
    kept: Tensor

    @classmethod
    def of(cls, order: Tensor, scorer: Scorer) -> Stripes:
        """Score the arrangements ``order``."""
        return cls(order, scorer.stripe(order.flatten(0, 1)).view(order.shape[:2]))

    @property
    def total(self) -> Tensor:
        """Return the kept sum of each arrangement, ``[batch]`` float64."""
        return self.kept.double().sum(1)

    def copies(self, count: int) -> Stripes:
        """Return ``count`` copies of the first arrangement."""
        return Stripes(self.order[:1].repeat(count, 1, 1), self.kept[:1].repeat(count, 1))

    def best(self, count: int) -> Stripes:
        """Return the ``count`` arrangements with the largest kept sums, best first."""
        places = self.total.argsort(descending=True, stable=True)[:count]
        return Stripes(self.order[places], self.kept[places])

    def concat(self, other: Stripes) -> Stripes:
        """Return the arrangements of both batches."""
        return Stripes(torch.cat([self.order, other.order]), torch.cat([self.kept, other.kept]))


@dataclass(eq=False)
class _Greedy:
    """The greedy phase over all groups of ``size`` stripes, in place on a batch."""

    state: Stripes
    scorer: Scorer
    size: int
    groups: Tensor = field(init=False)
    holds: Tensor = field(init=False)
    gain: Tensor = field(init=False)
    way: Tensor = field(init=False)

    def __post_init__(self) -> None:
        batch, stripes, group = self.state.order.shape
        device = self.state.order.device
        self.splits = all_splits(group, self.size).to(device)
        self.groups = torch.combinations(torch.arange(stripes, device=device), self.size)
        self.holds = torch.zeros((stripes, len(self.groups)), dtype=torch.bool, device=device)
        self.holds[self.groups.T, torch.arange(len(self.groups), device=device)] = True
        self.gain = torch.zeros((batch, len(self.groups)), device=device)
        self.way = torch.zeros((batch, len(self.groups)), dtype=torch.int64, device=device)

    def columns(self, where: Tensor, groups: Tensor) -> Tensor:
        """Return the columns of groups of stripes, ascending: ``[n, size · group]``."""
        return self.state.order[where[:, None], self.groups[groups]].flatten(1).sort(1).values

    def score(self, changed: Tensor) -> None:
        """Score the groups that contain a stripe of ``changed`` ``[batch, stripes]`` again."""
        where, groups = (changed.float() @ self.holds.float() > 0).nonzero(as_tuple=True)
        kept, way = self.scorer.best(self.columns(where, groups), self.splits)
        before = self.state.kept[where[:, None], self.groups[groups]].sum(1)
        self.gain[where, groups] = (kept - before).masked_fill(kept - before <= GAIN * before, 0.0)
        self.way[where, groups] = way

    def disjoint(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the best group of each element, then the best of those that share no stripe with it, and so on."""
        gain = self.gain.clone()
        everywhere = torch.arange(len(gain), device=gain.device)
        while True:
            best, groups = gain.max(1)
            where = everywhere[best > 0]
            if not len(where):
                return
            yield where, groups[where]
            taken = self.holds[self.groups[groups[where]]].any(1)
            gain[where] = gain[where].masked_fill(taken, 0.0)

    def apply(self) -> Tensor:
        """Apply the best splits, and return which stripes changed: bool ``[batch, stripes]``."""
        changed = torch.zeros_like(self.state.kept, dtype=torch.bool)
        chosen = list(self.disjoint())
        if not chosen:
            return changed
        where, groups = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        places = self.splits.subsets[self.splits.ways[self.way[where, groups]]]  # [n, size, group]
        columns = self.columns(where, groups)
        moved = columns[torch.arange(len(columns), device=columns.device)[:, None, None], places]
        stripes = self.groups[groups]
        self.state.order[where[:, None], stripes] = moved
        self.state.kept[where[:, None], stripes] = self.scorer.stripe(moved.flatten(0, 1)).view(stripes.shape)
        changed[where[:, None], stripes] = True
        return changed

    def run(self, changed: Tensor) -> None:
        while changed.any():
            self.score(changed)
            changed = self.apply()


def converge_(state: Stripes, scorer: Scorer, size: int, changed: Tensor | None = None) -> Stripes:
    """Run the greedy phase over groups of ``size`` stripes, in place, until no group gains.

    ``changed``, bool ``[batch, stripes]``, restricts the first pass to groups with these stripes; None takes all.
    """
    if state.order.shape[1] >= size:
        _Greedy(state, scorer, size).run(torch.ones_like(state.kept, dtype=torch.bool) if changed is None else changed)
    return state


def perturb_(state: Stripes, scorer: Scorer, swaps: int, generator: torch.Generator) -> Tensor:
    """Exchange ``swaps`` random pairs of columns in every arrangement, in place, and return the changed stripes."""
    batch, stripes, group = state.order.shape
    device = state.order.device
    swaps = min(swaps, stripes // 2)
    pair = torch.rand((batch, stripes), generator=generator).argsort(1)[:, : 2 * swaps].to(device)
    slot = torch.randint(group, (batch, 2 * swaps), generator=generator).to(device)
    where = torch.arange(batch, device=device)[:, None]
    taken = state.order[where, pair, slot]
    state.order[where, pair, slot] = taken.view(batch, swaps, 2).flip(2).flatten(1)
    state.kept[where, pair] = scorer.stripe(state.order[where, pair].flatten(0, 1)).view(pair.shape)
    changed = torch.zeros_like(state.kept, dtype=torch.bool)
    changed[where, pair] = True
    return changed


def escape(state: Stripes, scorer: Scorer, tries: int, batch: int, swaps: int, generator: torch.Generator) -> Stripes:
    """Run ``tries`` regressions from the first arrangement, ``batch`` at a time, each batch from the best so far."""
    best = Stripes(state.order[:1], state.kept[:1])
    while tries > 0 and state.order.shape[1] > 2:
        others = best.copies(min(batch, tries))
        tries -= len(others.order)
        converge_(others, scorer, 2, perturb_(others, scorer, swaps, generator))
        found = others.best(1)
        if float(found.total) > float(best.total):
            best = found
    return best
