"""Iterative pruning: the division of a training into a dense phase and rounds of retraining."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedules import as_step

# The exclusive slot of a recipe for a step that prunes in rounds and sets the learning rate between them. Such a step
# has the fields ``sparsity``, ``rounds``, ``scope``, ``targets`` and ``skip``.
ROUNDS = "the rounds of a training"


def round_sparsity(sparsity: float, number: int, rounds: int) -> float:
    """Return the sparsity after round ``number`` of ``rounds``, each of which removes the same share of what is left.

    ``s_r = 1 - (1 - s)^(r / n)``, so that ``s_n`` is exactly ``sparsity``, and ``s_0`` is 0.
    """
    if number >= rounds:
        return sparsity
    return 1.0 - (1.0 - sparsity) ** (number / rounds)


@dataclass(frozen=True)
class RetrainingPhases:
    """The division of the steps of one training.

    The optional dense phase runs through the positions ``0 .. length - 1`` of a learning-rate schedule; each round of
    retraining runs through ``rewind_step .. length - 1`` of it. A remainder of steps, fewer than there are phases,
    prolongs the last round.

    Attributes:
        max_steps: optimizer steps of the whole training.
        rounds: requested rounds of retraining.
        dense: True if a dense phase comes first.
        length: steps of the schedule.
        rewind_step: the position in the schedule at which a round begins.
    """

    max_steps: int
    rounds: int
    dense: bool
    length: int
    rewind_step: int

    @classmethod
    def divide(cls, max_steps: int, rounds: int, dense: bool, rewind_to: int | float = 0) -> RetrainingPhases:
        """Find the longest phases that fit. If none fit, the rounds have one step each, and only some of them fit.

        Args:
            max_steps: optimizer steps of the whole training.
            rounds: rounds of retraining.
            dense: True for a dense phase before the rounds.
            rewind_to: the position at which a round begins: a step, or a share of the schedule in [0, 1).
        """
        part = 0.0 if isinstance(rewind_to, int) else rewind_to
        begin = rewind_to if isinstance(rewind_to, int) else 0
        slope = dense + rounds * (1.0 - part)
        # In every round a position that is a share is rounded, by at most a half.
        length = math.ceil((max_steps + rounds * (begin + 0.5)) / slope) + 1
        while length > begin and not cls._at(max_steps, rounds, dense, length, rewind_to).fits():
            length -= 1
        while length <= as_step(rewind_to, length):
            length += 1
        return cls._at(max_steps, rounds, dense, length, rewind_to)

    @classmethod
    def _at(cls, max_steps: int, rounds: int, dense: bool, length: int, rewind_to: int | float) -> RetrainingPhases:
        return cls(max_steps, rounds, dense, length, as_step(rewind_to, length))

    @property
    def steps_per_round(self) -> int:
        """Return the steps of a round."""
        return self.length - self.rewind_step

    def fits(self) -> bool:
        """Return True if all rounds end within the training."""
        return self.round_start(self.rounds) + self.steps_per_round <= self.max_steps

    def round_start(self, number: int) -> int:
        """Return the number of finished steps after which round ``number`` (from 1) begins."""
        return self.dense * self.length + (number - 1) * self.steps_per_round

    @property
    def rounds_that_fit(self) -> int:
        """Return how many rounds begin before training ends."""
        return sum(self.round_start(number) < self.max_steps for number in range(1, self.rounds + 1))

    def round_at(self, step: int) -> int:
        """Return the round that begins after ``step`` finished steps, or 0."""
        number, rest = divmod(step - self.dense * self.length, self.steps_per_round)
        return number + 1 if rest == 0 and 0 <= number < self.rounds_that_fit else 0
