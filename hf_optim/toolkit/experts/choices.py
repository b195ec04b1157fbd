"""Which of several ways to run an exchange is fastest: tried in turn, timed, and decided alike on all ranks.

A choice is made for each *situation*: a bucket of tokens, one of load, with and without gradients. The ways are run
in turn, a few times each; then the slowest rank's times are compared, and the fastest way is kept. Turns depend
only on numbers that all ranks have, and the times are reduced over the ranks, so that all ranks take the same way.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..distributed.grid import Grid, failures_named

log = logging.getLogger(__name__)

MAX_SITUATIONS = 256
"""Choices that a layer keeps; further situations take the first way and are not timed."""


@dataclass(frozen=True)
class Way:
    """One way to bring tokens and experts together.

    Attributes:
        parallelism: ``exchange``: tokens go to the ranks of their experts; ``gather``: weights of experts come to
            tokens, so that each rank runs all experts on its own.
        order: of the exchange.
        degree: chunks whose exchange and product overlap.
    """

    parallelism: str
    order: str = "flat"
    degree: int = 1

    def __str__(self) -> str:
        return "gather" if self.parallelism == "gather" else f"exchange {self.order} x{self.degree}"


def ways_of(parallelism: str, orders: Sequence[str], degrees: Sequence[int]) -> tuple[Way, ...]:
    """Return the ways that a setting allows, those with an exchange in one chunk first."""
    found = [Way("exchange", "flat", degree) for degree in degrees]
    found += [Way("exchange", order, min(degrees)) for order in orders if order != "flat"]
    return tuple([way for way in found if parallelism != "gather"] + [Way("gather")] * (parallelism != "exchange"))


@dataclass(frozen=True)
class Situation:
    """What a choice depends on.

    Attributes:
        pairs: most pairs of token and expert of a rank, up to the next power of two.
        imbalance: pairs that the busiest rank computes, as a multiple of the mean, to the nearest power of sqrt(2).
        training: with gradients; then the time is that of forward and backward.
    """

    pairs: int
    imbalance: float
    training: bool

    @classmethod
    def of(cls, table: Sequence[Sequence[int]], training: bool) -> Situation:
        """Return the situation in which rank s has ``table[s][r]`` pairs for rank r."""
        most = max(map(sum, table))
        loads = [sum(row[rank] for row in table) for rank in range(len(table))]
        ratio = max(loads) * len(loads) / max(1, sum(loads))
        return cls(2 ** max(0, (most - 1).bit_length()) if most else 0, _rounded(ratio), training)


def _rounded(ratio: float) -> float:
    return 2.0 ** (round(2 * math.log2(ratio)) / 2) if ratio > 0 else 0.0


@dataclass(eq=False)
class Decision:
    """The times of one situation, and what they decide.

    Attributes:
        calls: forwards in this situation so far, until it is decided.
        spent: for each way its times in seconds on this rank.
        times: for each way the best time of the slowest rank; empty until decided.
        chosen: the number of the fastest way; None until decided.
    """

    ways: tuple[Way, ...]
    calls: int = 0
    spent: list[list[float]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    chosen: int | None = None

    def __post_init__(self) -> None:
        self.spent = [[] for _ in self.ways]


class Choices:
    """The choices of one layer on this rank.

    Attributes:
        ways: what is tried.
        decisions: by situation.
    """

    def __init__(self, ways: tuple[Way, ...], trials: int, grid: Grid, name: str = "experts") -> None:
        self.ways, self.trials, self.grid, self.name = ways, trials, grid, name
        self.decisions: dict[Situation, Decision] = {}
        self.last = ways[0]

    def turn(self, situation: Situation, device: torch.device) -> tuple[Way, Stopwatch | None]:
        """Return the way of this forward, and the stopwatch if it is timed. All ranks must call it alike."""
        if recomputing():
            return self.last, None  # gradient checkpointing must repeat what the forward did
        way, watch = self._turn(situation, device)
        self.last = way
        return way, watch

    def _turn(self, situation: Situation, device: torch.device) -> tuple[Way, Stopwatch | None]:
        if len(self.ways) == 1:
            return self.ways[0], None
        found = self.decisions.get(situation)
        if found is None:
            if len(self.decisions) >= MAX_SITUATIONS:
                return self.ways[0], None
            found = self.decisions[situation] = Decision(self.ways)
        if found.chosen is None and found.calls == len(self.ways) * (self.trials + 1):
            self._decide(situation, found, device)
        if found.chosen is not None:
            return self.ways[found.chosen], None
        # In turn, not one after the other: the speed of a machine drifts by more than ways differ.
        trial, number = divmod(found.calls, len(self.ways))
        found.calls += 1
        return self.ways[number], Stopwatch(found.spent[number], device) if trial else None

    def _decide(self, situation: Situation, found: Decision, device: torch.device) -> None:
        """Take the fastest way, by the times of the slowest rank."""
        best = [min(times, default=math.inf) for times in found.spent]
        shared = torch.tensor(best, dtype=torch.float64, device=device)
        with failures_named():
            dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.grid.group)
        found.times = shared.tolist()
        found.chosen = min(range(len(found.times)), key=found.times.__getitem__)
        log.info("%s: %s", self.name, explain(situation, found))

    def report(self) -> list[dict[str, Any]]:
        """Return the choices so far: situation, times in milliseconds by way, the chosen way, and why."""
        return [
            {
                "pairs": situation.pairs,
                "imbalance": round(situation.imbalance, 3),
                "training": situation.training,
                "milliseconds": {
                    str(way): round(1e3 * seconds, 4)
                    for way, seconds in zip(found.ways, found.times, strict=False)
                    if math.isfinite(seconds)
                },
                "chosen": None if found.chosen is None else str(found.ways[found.chosen]),
                "why": explain(situation, found),
            }
            for situation, found in self.decisions.items()
        ]


def explain(situation: Situation, found: Decision) -> str:
    """Return a choice in words."""
    what = "forward and backward" if situation.training else "forward"
    where = f"up to {situation.pairs} pairs of a rank, the busiest with {situation.imbalance:.2g} times the mean"
    if found.chosen is None:
        return f"{where}: {found.calls} forwards so far, to time {len(found.ways)} ways ({what})"
    order = sorted(range(len(found.times)), key=found.times.__getitem__)
    ranked = ", ".join(f"{found.ways[i]} {1e3 * found.times[i]:.3g} ms" for i in order[:3])
    return f"{where}: {found.ways[order[0]]} is the fastest ({what}: {ranked})"


class Stopwatch:
    """Measures one forward, and its backward if there is one; the sum is kept in a list."""

    def __init__(self, kept: list[float], device: torch.device) -> None:
        self.kept, self.device, self.place = kept, device, -1
        self.start = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def at_input(self, tensor: Tensor) -> Tensor:
        """Return the input; its gradient ends the backward."""
        return _Mark.apply(tensor, self, False) if tensor.requires_grad else tensor  # type: ignore[no-any-return]

    def at_output(self, tensor: Tensor) -> Tensor:
        """Return the output, which ends the forward; its gradient starts the backward."""
        self.kept.append(self._now() - self.start)
        self.place = len(self.kept) - 1
        return _Mark.apply(tensor, self, True) if tensor.requires_grad else tensor  # type: ignore[no-any-return]

    def backward(self, begins: bool) -> None:
        """Note that the backward begins or ends."""
        if begins:
            self.start = self._now()
        else:
            self.kept[self.place] += self._now() - self.start


class _Mark(torch.autograd.Function):
    """The identity, whose backward calls a stopwatch."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, watch: Stopwatch, begins: bool) -> Tensor:
        ctx.watch, ctx.begins = watch, begins
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        ctx.watch.backward(ctx.begins)
        return grads[0], None, None


def recomputing() -> bool:
    """Return True within a backward, where gradient checkpointing calls forwards again."""
    return bool(torch._C._current_graph_task_id() != -1)
