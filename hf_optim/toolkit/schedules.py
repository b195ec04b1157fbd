"""Schedules over training steps."""

from __future__ import annotations

from dataclasses import dataclass


def cubic_ramp(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """The sparsity of Zhu & Gupta (1710.01878, equation 1) after ``step`` optimizer steps.

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n Δt))³``, with ``t0 = begin`` and ``n Δt = end - begin``. It rises fast
    while weights are redundant and slowly when few are left; ``initial`` before ``begin`` and ``final`` from ``end``
    on.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    remaining = 1.0 - (step - begin) / (end - begin)
    return final + (initial - final) * remaining**3


@dataclass(frozen=True)
class Ramp:
    """When sparsity is raised, and to what.

    Attributes:
        begin, end: first and last update, counted in finished optimizer steps.
        every: steps between updates; the last one is at ``end`` whether or not it divides the ramp.
        initial, final: sparsity at ``begin`` and at ``end``.
    """

    begin: int
    end: int
    every: int
    initial: float
    final: float

    def updates_at(self, step: int) -> bool:
        """Whether masks are renewed after ``step`` finished optimizer steps."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def sparsity(self, step: int) -> float:
        """The sparsity that the formula gives at ``step``."""
        return cubic_ramp(step, self.begin, self.end, self.initial, self.final)

    def reached(self, step: int) -> float:
        """The sparsity of the last update at or before ``step``; 0 when there was none."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return self.sparsity(step - (step - self.begin) % self.every)


def as_step(position: int | float, max_steps: int) -> int:
    """A position in training as a number of steps: a whole number is one, a float in [0, 1] is a share of all."""
    return position if isinstance(position, int) else round(position * max_steps)
