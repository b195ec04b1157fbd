"""Training in phases: an original one, and rounds of retraining that are each as long as the part they repeat."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .schedules import as_step

# The place of a recipe that a step takes which prunes in rounds, and sets the learning rate between them. Such a step
# has the fields ``sparsity``, ``rounds``, ``scope``, ``targets`` and ``skip``.
ROUNDS = "the rounds of a training"


def round_sparsity(sparsity: float, number: int, rounds: int) -> float:
    """The sparsity after round ``number`` of ``rounds`` that all remove the same share of what is left.

    ``s_r = 1 - (1 - s)^(r / n)``, so that ``s_n`` is ``sparsity`` itself; ``s_0`` is 0.
    """
    if number >= rounds:
        return sparsity
    return 1.0 - (1.0 - sparsity) ** (number / rounds)


@dataclass(frozen=True)
class RetrainingPhases:
    """How the steps of one training are divided.

    The dense phase, where there is one, runs through the positions ``0 .. length - 1`` of a schedule; each round of
    retraining runs through ``position .. length - 1`` of it. Steps that do not divide are left over at the end: fewer
    than there are phases, they prolong the last round.

    Attributes:
        max_steps: optimizer steps of the whole training.
        rounds: rounds asked for.
        dense: whether a dense phase comes first.
        length: steps of a schedule from its beginning.
        position: where in the schedule a round begins.
    """

    max_steps: int
    rounds: int
    dense: bool
    length: int
    position: int

    @classmethod
    def divide(cls, max_steps: int, rounds: int, dense: bool, rewind_to: int | float = 0) -> RetrainingPhases:
        """The longest phases that fit; where none do, phases with rounds of one step, of which only some fit.

        Args:
            max_steps: optimizer steps of the whole training.
            rounds: rounds of retraining.
            dense: whether a dense phase comes first.
            rewind_to: the position where a round begins: a step, or a share of the schedule in [0, 1).
        """
        part = 0.0 if isinstance(rewind_to, int) else rewind_to
        begin = rewind_to if isinstance(rewind_to, int) else 0
        slope = dense + rounds * (1.0 - part)
        # The position of a share is rounded, by a half at most, in every round.
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
    def retraining(self) -> int:
        """Steps of a round."""
        return self.length - self.position

    def fits(self) -> bool:
        """Whether all rounds lie inside the training."""
        return self.starts(self.rounds) + self.retraining <= self.max_steps

    def starts(self, number: int) -> int:
        """The finished steps after which round ``number`` (from 1) begins."""
        return self.dense * self.length + (number - 1) * self.retraining

    @property
    def fitting(self) -> int:
        """How many of the rounds begin before training ends."""
        return sum(self.starts(number) < self.max_steps for number in range(1, self.rounds + 1))

    def round_at(self, step: int) -> int:
        """The round that begins after ``step`` finished steps, or 0."""
        number, rest = divmod(step - self.dense * self.length, self.retraining)
        return number + 1 if rest == 0 and 0 <= number < self.fitting else 0
