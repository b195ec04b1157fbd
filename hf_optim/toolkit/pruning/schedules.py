"""Schedules over training steps."""

from __future__ import annotations

from dataclasses import dataclass

from ...errors import RecipeError


def cubic_sparsity(step: int, begin: int, end: int, initial: float, final: float) -> float:
    """Return the sparsity of Zhu & Gupta (1710.01878, equation 1) after ``step`` optimizer steps.

    ``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n Δt))³``, with ``t0 = begin`` and ``n Δt = end - begin``. It rises fast
    while weights are redundant and slowly when few are left; it is ``initial`` before ``begin`` and ``final`` from
    ``end`` on.
    """
    if step >= end:
        return final
    if step <= begin:
        return initial
    remaining = 1.0 - (step - begin) / (end - begin)
    return final + (initial - final) * remaining**3


@dataclass(frozen=True)
class SparsitySchedule:
    """A cubic sparsity schedule.

    Attributes:
        begin, end: first and last update, counted in finished optimizer steps.
        every: steps between updates; the last one is at ``end``, even if ``every`` does not divide ``end - begin``.
        initial, final: sparsity at ``begin`` and at ``end``.
    """

    begin: int
    end: int
    every: int
    initial: float
    final: float

    def is_update_step(self, step: int) -> bool:
        """Return True if masks are updated after ``step`` finished optimizer steps."""
        return step == self.end or (self.begin <= step < self.end and (step - self.begin) % self.every == 0)

    def sparsity(self, step: int) -> float:
        """Return the sparsity of the formula at ``step``."""
        return cubic_sparsity(step, self.begin, self.end, self.initial, self.final)

    def last_sparsity(self, step: int) -> float:
        """Return the sparsity of the last update at or before ``step``; 0 if there was none."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return self.final
        return self.sparsity(step - (step - self.begin) % self.every)


def unfinished_schedule_message(schedule: SparsitySchedule, max_steps: int) -> str:
    """Return a warning if training ends after ``max_steps`` steps and the schedule later, else an empty string.

    The warning gives the sparsity that the model reaches.
    """
    if schedule.end <= max_steps:
        return ""
    reached = f"the model reaches a sparsity of {schedule.last_sparsity(max_steps):.4f} instead of {schedule.final:g}"
    return cut_schedule_message(schedule.end, f"training at step {max_steps}", reached, "train longer, or lower end")


def cut_schedule_message(end: int, cut: str, reached: str, remedy: str) -> str:
    """Return the warning for a schedule that is cut off: its last step, the cause, the consequence, and the remedy."""
    return f"the schedule ends at step {end}, but {cut}: {reached}; {remedy}"


def as_step(position: int | float, max_steps: int) -> int:
    """Convert a position in training to a step: an int is a step, a float in [0, 1] a share of ``max_steps``."""
    return position if isinstance(position, int) else round(position * max_steps)


def linear_schedule(step: int, begin: int, end: int) -> float:
    """Return 0 up to ``begin``, 1 from ``end`` on, and a linear interpolation between them."""
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin)) if step > begin else 0.0


def check_positions(name: str, **positions: int | float | None) -> None:
    """Raise ``RecipeError`` for invalid positions in training: a share above 1, or a wrong order.

    The order is ``begin <= end <= settle``; only positions of the same kind are compared.

    Args:
        name: name of the technique.
        positions: name of the field -> a step (int), a share of training (float), or None.
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
