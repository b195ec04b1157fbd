"""Base of the techniques that prune in rounds: their hooks, their entry on the record and their card.

After round ``r`` of ``n`` a share ``s_r = 1 - (1 - s)^(r / n)`` of the weights is zero: every round removes the same
share of the remaining weights, and the last one ends exactly at ``s``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from hf_optim import RecipeError, Rounds, RoundTraining, Technique, hookimpl
from hf_optim.toolkit.pruning import masks, sparsity

from . import _recompute

if TYPE_CHECKING:
    from hf_optim import Card, Run


class InRounds(Technique):
    """A technique with the fields ``sparsity``, ``rounds``, ``dense``, ``scope``, ``targets`` and ``skip``."""

    sparsity: float
    rounds: int
    dense: bool
    scope: str
    targets: tuple[str, ...]
    skip: tuple[str, ...]

    title = ""

    def driver(self, rounds: Rounds) -> RoundTraining:
        """Return the callback that runs the rounds and restores weights or learning rates between them."""
        raise NotImplementedError

    def between(self) -> str:
        """Return what happens between the rounds, as the end of a sentence on the card."""
        raise NotImplementedError

    def takes(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding) or super().takes(module)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        rounds = Rounds(
            run,
            sparsity=self.sparsity,
            rounds=self.rounds,
            scope=self.scope,
            targets=self.targets,
            skip=self.skip,
            step=self,
        )
        return [self.driver(rounds)]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        state = run.state(self)
        names, _ = run.covered(self) or (set(), {})
        masks.zero_masked_(run.model, run.masks, masks.parameters_of(run.masks, names))
        done, reached = getattr(state, "done", 0), getattr(state, "sparsities", [])
        run.report(self, **sparsity.metrics(run.model, names), rounds=done, sparsities=reached)
        if done < self.rounds:
            run.warn(
                self,
                f"the model is that of round {done} of {self.rounds}, with a sparsity of "
                f"{reached[-1] if reached else 0.0:.4f} instead of {self.sparsity:g}: training was too short or "
                "stopped early",
            )

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute.rounds(case, self)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        rounds = ", ".join(f"{100 * reached:.1f} %" for reached in metrics["sparsities"])
        card.paragraph(
            self.title,
            f"Pruned by magnitude in rounds (sparsity after each: {rounds or 'none was started'}); {self.between()}. "
            f"{100 * metrics['sparsity']:.1f} % of the targeted weights are zero.",
        )
        card.table(
            f"Sparsity after {self.title.lower()}", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"])
        )


def check_position(name: str, position: int | float) -> None:
    """Raise ``RecipeError`` for a rewinding position that is neither a step nor a share in [0, 1)."""
    if isinstance(position, float) and position >= 1.0:
        raise RecipeError(
            f"{name}: rewind_to is a share of one phase in [0, 1) or a whole number of steps, not {position!r}"
        )
