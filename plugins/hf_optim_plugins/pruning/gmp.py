"""Gradual magnitude pruning: raise the sparsity while the model trains (Zhu & Gupta, 1710.01878).

``s_t = s_f + (s_i - s_f) (1 - (t - t0) / (n Δt))³`` for ``t ∈ {t0, t0 + Δt, ..., t0 + n Δt}`` (equation 1). At each of
these steps the weights of smallest magnitude are removed until a share ``s_t`` is zero. Removed weights stay removed,
without gradient; the remaining weights continue to train and recover the loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from hf_optim import (
    Contract,
    Paper,
    RecipeError,
    Reload,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.pruning import masks, schedules, sparsity
from hf_optim.toolkit.topology import require_layers, unprunable_experts

if TYPE_CHECKING:
    from hf_optim import Card, Run


@technique(
    "gmp",
    family="pruning",
    paper=Paper(
        "1710.01878", "To prune, or not to prune: exploring the efficacy of pruning for model compression", 2017
    ),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
    trains=True,
    parallel={"data": "yes", "fsdp": "yes"},
)
class GMP(Technique):
    """Prune gradually during training, along a cubic ramp.

    Steps are optimizer steps, counted as the Trainer counts them (``state.global_step``). ``begin`` and ``end`` are
    steps if whole numbers, and shares of training if floats: ``end: 1`` is the first step, ``end: 1.0`` the end of
    training. The masks of a step are renewed right after it, so a run resumed from a checkpoint continues with bitwise
    identical weights.

    Attributes:
        sparsity: share of the weights that is removed at the end, in [0, 1).
        initial: share that is removed at ``begin``.
        begin: start of the ramp: a step, or a share of training.
        end: the last update; training after it only recovers the loss.
        every: steps between updates (Δt); there is one more update at ``end`` if Δt does not divide the ramp.
        scope: ``"layer"`` prunes every layer to the ramp, ``"global"`` all targets together, ranked across layers.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named
            exactly, embeddings only if a pattern names them.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    initial: float = option(0.0, low=0.0, below=1.0)
    begin: int | float = option(0, low=0)
    end: int | float = option(0.75, low=0)
    every: int = option(10, low=1)
    scope: str = option("layer", choices=("layer", "global"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        schedules.check_positions(self.name, begin=self.begin, end=self.end)
        if self.initial > self.sparsity:
            raise RecipeError(f"gmp: initial must be <= sparsity, not {self.initial} > {self.sparsity}")

    def training_bytes(self, width: int) -> float:
        return 1.0  # the mask

    def ramp(self, max_steps: int) -> schedules.SparsitySchedule:
        """Return the schedule for ``max_steps`` optimizer steps. Raises ``RecipeError`` if it ends before it begins."""
        begin, end = schedules.as_step(self.begin, max_steps), schedules.as_step(self.end, max_steps)
        if begin > end:
            raise RecipeError(
                f"gmp: the schedule begins at step {begin} and ends at step {end} of {max_steps}; give begin and end "
                "both as steps or both as shares"
            )
        return schedules.SparsitySchedule(begin, end, self.every, self.initial, self.sparsity)

    def takes(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding) or super().takes(module)

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        layers = run.select(self.targets, self.skip, embeddings=True, experts=True)
        require_layers(layers, run.model, run.label(self))
        names = masks.weight_names(layers)
        run.cover(self, names, unprunable_experts(run.model, self.targets, self.skip))
        return [RampPruning(self, run, list(names.values()))]

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        names, _ = run.covered(self) or (set(), {})
        masks.zero_masked_(run.model, run.masks, masks.parameters_of(run.masks, names))
        run.report(self, **sparsity.metrics(run.model, names))

    def recompute(self, case: Any) -> dict[str, Any]:
        return case.zeros()

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        card.paragraph(
            "Gradual magnitude pruning",
            f"Pruned during training, from {100 * self.initial:g} % towards {100 * self.sparsity:g} % along a cubic "
            f"ramp; {100 * metrics['sparsity']:.1f} % of the targeted weights are zero.",
        )
        card.table("Sparsity after gradual pruning", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"]))


class RampPruning(TrainerCallback):
    """Renews ``run.masks`` along the ramp. It has no state: everything follows from ``global_step`` and the masks."""

    def __init__(self, step: GMP, run: Run, weights: list[str]) -> None:
        self.step = step
        self.run = run
        self.weights = weights

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ramp = self.step.ramp(state.max_steps)
        if sentence := schedules.unfinished_schedule_message(ramp, state.max_steps):
            self.run.warn(self.step, sentence)
        if state.global_step == 0 and ramp.is_update_step(0):
            self._prune(ramp.sparsity(0))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        ramp = self.step.ramp(state.max_steps)
        if ramp.is_update_step(state.global_step):
            self._prune(ramp.sparsity(state.global_step))

    def _prune(self, share: float) -> None:
        weights = masks.MatrixWeights(self.run.model, self.weights)
        masks.require_finite(weights, self.run.label(self.step))
        rank = masks.layer_masks if self.step.scope == "layer" else masks.global_masks
        masks.prune_(self.run.model, self.run.masks, rank(weights, share, self.run.masks))


@hookimpl
def register_techniques(register):
    register(GMP)
