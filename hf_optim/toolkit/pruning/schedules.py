"""Schedules over training steps."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError


def cubic_sparsity(step: int, begin: int, end: int, initial: float, final: float) -> float:
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
class SparsitySchedule:
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
        return cubic_sparsity(step, self.begin, self.end, self.initial, self.final)

    def reached(self, step: int) -> float:
        """The sparsity of the last update at or before ``step``; 0 when there was none."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return self.sparsity(step - (step - self.begin) % self.every)


def unfinished_schedule_message(ramp: SparsitySchedule, max_steps: int) -> str:
    """Return a warning if training ends after ``max_steps`` steps and the ramp later, else the empty string.

    The warning gives the sparsity that the model reaches.
    """
    if ramp.end <= max_steps:
        return ""
    reached = f"the model reaches a sparsity of {ramp.reached(max_steps):.4f} instead of {ramp.final:g}"
    return cut_schedule_message(ramp.end, f"training at step {max_steps}", reached, "train longer, or lower end")


def cut_schedule_message(end: int, cut: str, reached: str, remedy: str) -> str:
    """Return the warning for a ramp that is cut off: its last step, the cause, what is reached, and the remedy."""
    return f"the ramp ends at step {end}, but {cut}: {reached}; {remedy}"


def as_step(position: int | float, max_steps: int) -> int:
    """A position in training as a number of steps: a whole number is one, a float in [0, 1] is a share of all."""
    return position if isinstance(position, int) else round(position * max_steps)


def linear_schedule(step: int, begin: int, end: int) -> float:
    """0 up to ``begin``, 1 from ``end`` on, a straight line between."""
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin)) if step > begin else 0.0


def check_positions(name: str, **positions: int | float | None) -> None:
    """Raise ``RecipeError`` for positions in training that make no sense: shares above 1, ``begin`` after ``end``, or
    ``end`` after ``settle``.

    ``name`` is the technique's; each position is a step, a share of training where a float, or None.
    """
    for field, value in positions.items():
        if isinstance(value, float) and value > 1.0:
            raise RecipeError(
                f"{name}: {field} is a share of training in [0, 1] or a whole number of steps, not {value!r}"
            )
    for first, second in (("begin", "end"), ("end", "settle")):
        one, other = positions.get(first), positions.get(second)
        if one is not None and other is not None and type(one) is type(other) and one > other:
            raise RecipeError(f"{name}: {first} must be <= {second}, not {one!r} > {other!r}")
