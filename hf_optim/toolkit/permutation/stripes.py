"""Stripe groups: every way to share out the columns of two or three stripes is tried, the best gain first.

Pool & Yu (NeurIPS 2021): all groups of stripes are scored; the one that gains most is taken, groups that share a stripe
with it wait, and those that hold a changed stripe are scored again, until none gains. From such a minimum a bounded
number of regressions leads on: columns are exchanged at random, for the worse, and the search goes on from there.

Several searches run at once here, as a batch: a regression is one more element of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .scores import Scorer
from .splits import all_splits

GAIN = 1e-6
"""A gain below this share of what a stripe keeps is rounding."""


@dataclass(eq=False)
class Stripes:
    """A batch of arrangements of the same columns.

    Attributes:
        order: ``[batch, stripes, group]`` int64: the columns of each stripe.
        kept: ``[batch, stripes]``: what a mask keeps of each.
    """

    order: Tensor
    kept: Tensor

    @classmethod
    def of(cls, order: Tensor, scorer: Scorer) -> Stripes:
        return cls(order, scorer.stripe(order.flatten(0, 1)).view(order.shape[:2]))

    @property
    def total(self) -> Tensor:
        """``[batch]`` float64."""
        return self.kept.double().sum(1)

    def copies(self, count: int) -> Stripes:
        """The first arrangement, ``count`` times."""
        return Stripes(self.order[:1].repeat(count, 1, 1), self.kept[:1].repeat(count, 1))

    def best(self, count: int) -> Stripes:
        """The ``count`` arrangements that keep most, the best first."""
        places = self.total.argsort(descending=True, stable=True)[:count]
        return Stripes(self.order[places], self.kept[places])

    def joined(self, other: Stripes) -> Stripes:
        return Stripes(torch.cat([self.order, other.order]), torch.cat([self.kept, other.kept]))


@dataclass(eq=False)
class _Greedy:
    """The greedy phase over all groups of ``size`` stripes, on a batch in place."""

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
        """``[n, size · group]``: the columns of groups of stripes, ascending."""
        return self.state.order[where[:, None], self.groups[groups]].flatten(1).sort(1).values

    def score(self, changed: Tensor) -> None:
        """Score the groups again that hold a stripe of ``changed`` ``[batch, stripes]``."""
        where, groups = (changed.float() @ self.holds.float() > 0).nonzero(as_tuple=True)
        kept, way = self.scorer.best(self.columns(where, groups), self.splits)
        before = self.state.kept[where[:, None], self.groups[groups]].sum(1)
        self.gain[where, groups] = (kept - before).masked_fill(kept - before <= GAIN * before, 0.0)
        self.way[where, groups] = way

    def disjoint(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The best group of each element, then the best of those that share no stripe with it, and so on."""
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
        """Rearrange; which stripes changed, bool ``[batch, stripes]``."""
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
    """The greedy phase over groups of ``size`` stripes, in place, until no group gains.

    ``changed`` bool ``[batch, stripes]``: the stripes at which to look first; all by default.
    """
    if state.order.shape[1] >= size:
        _Greedy(state, scorer, size).run(torch.ones_like(state.kept, dtype=torch.bool) if changed is None else changed)
    return state


def perturb_(state: Stripes, scorer: Scorer, swaps: int, generator: torch.Generator) -> Tensor:
    """Exchange ``swaps`` random columns of random stripes in every arrangement; the stripes that changed."""
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
    """Bounded regressions from the first arrangement, ``batch`` at a time, each batch from the best so far."""
    best = Stripes(state.order[:1], state.kept[:1])
    while tries > 0 and state.order.shape[1] > 2:
        others = best.copies(min(batch, tries))
        tries -= len(others.order)
        converge_(others, scorer, 2, perturb_(others, scorer, swaps, generator))
        found = others.best(1)
        if float(found.total) > float(best.total):
            best = found
    return best
