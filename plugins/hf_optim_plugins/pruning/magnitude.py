"""One-shot pruning: remove the weights of the smallest absolute value, or of the smallest Wanda score.

``M_ij = 1`` where ``|W_ij|`` is among the ``(1 - s) n`` largest, else 0; ``W <- M ∘ W``. Han et al. (1506.02626,
section 3.1) prune within a layer, below a threshold of ``q`` times the standard deviation of its weights; here the
share of the weights is given, and the threshold follows. Ranking over all layers together is the global variant in Gale
et al. (1902.09574), who found plain magnitude pruning a strong baseline for far costlier methods.

Wanda (Sun et al., 2306.11695) ranks by ``|W_ij| · ‖X_j‖₂``, with the norm of the layer's ``j``-th input over the
calibration tokens, and compares the weights of one row (one output) with each other: ``score: activation``, ``scope:
row``, the recipe ``wanda50``. The inputs are those after the blocks before were pruned, as in the paper's code, and
nothing is refitted. Different from it: the number of weights removed from a row is rounded to nearest, not down.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.pruning import masks, sparsity
from hf_optim.toolkit.statistics import InputSquares, few_tokens_message, few_tokens_paragraph
from hf_optim.toolkit.topology import not_reached, unprunable_experts, weight_out_in

if TYPE_CHECKING:
    from torch import Tensor

    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)


@technique(
    "magnitude",
    family="pruning",
    paper=Paper("1506.02626", "Learning both Weights and Connections for Efficient Neural Networks", 2015),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
    parallel={"data": "yes", "fsdp": "yes"},
)
class Magnitude(Technique):
    """Remove the smallest weights at once, by magnitude or by the score of Wanda.

    They stay removed in any training that follows. Wanda (arXiv 2306.11695) is ``score: activation`` with ``scope:
    row``, the recipe ``wanda50``.

    The count is exact, and ties are broken by index (``hf_optim.toolkit.pruning.masks``). Weights that an earlier step
    removed stay removed and count, so an N:M pattern survives.

    Attributes:
        sparsity: share of the weights to remove, in [0, 1).
        scope: ``"layer"`` removes this share from every layer, ``"row"`` from every row of its weight (the inputs of
            one output), ``"global"`` from all targets together, ranked across layers by absolute value.
        score: ``"magnitude"``; ``"activation"``: magnitude times the norm of the input channel, as in Wanda (needs
            data; not with ``scope: global``).
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named
            exactly, embeddings only if a pattern names them, and only under ``score: magnitude``.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    scope: str = option("layer", choices=("layer", "row", "global"))
    score: str = option("magnitude", choices=("magnitude", "activation"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def takes(self, module: Any) -> bool:
        return (isinstance(module, nn.Embedding) and self.score == "magnitude") or super().takes(module)

    def validate(self) -> None:
        if self.score == "activation" and self.scope == "global":
            raise RecipeError(
                "magnitude: scores of activations are compared within a layer: set scope to row (Wanda) or layer"
            )

    def needs_data(self) -> bool:
        return self.score == "activation"

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        selected = scope.select(self.targets, self.skip, experts=True, embeddings=self.score == "magnitude")
        names = masks.weight_names(selected)
        skipped = unprunable_experts(run.model, self.targets, self.skip, inside=scope.name)
        if self.score == "activation":
            layers = {name: selected[name] for name in names}
            observer = InputSquares(layers, run.label(self))
            with observer as squares:
                yield
            self._report_scarce(run, observer.scarce)
            skipped |= not_reached(layers, squares)
            names = {name: weight for name, weight in names.items() if name in squares}
            new = self._rank_by_inputs(run, {name: layers[name] for name in names}, squares)
        elif self.scope != "global":
            new = _rank(self, run, names, selected)
        else:
            # Ranked once, before the first block changes: one threshold over all layers needs all of them.
            state = run.state(self)
            if not hasattr(state, "masks"):
                everything = run.select(self.targets, self.skip, embeddings=True, experts=True)
                state.masks = _rank(self, run, masks.weight_names(everything), everything)
            new = {name: state.masks.pop(name) for name in names.values() if name in state.masks}
        masks.prune_(run.model, run.masks, new)
        run.cover(self, names, skipped)
        yield from ()

    def _rank_by_inputs(self, run: Run, layers: Mapping[str, Any], squares: Mapping[str, Tensor]) -> masks.Masks:
        """Return name of a weight -> mask, in the layout of the parameter, by Wanda's score."""
        new: masks.Masks = {}
        for name, layer in layers.items():
            own, weight = masks.weight_name(name, layer), weight_out_in(layer).detach()
            masks.require_finite({own: weight}, run.label(self))
            score = weight.float().abs() * squares[name].sqrt()
            kept = masks.mask_out_in(layer, run.masks, own)
            earlier = {} if kept is None else {own: kept}
            rank = masks.row_masks if self.scope == "row" else masks.layer_masks
            new[own] = masks.as_stored(layer, rank({own: score}, self.sparsity, earlier)[own])
        return new

    def _report_scarce(self, run: Run, scarce: Mapping[str, int]) -> None:
        if scarce:
            run.report(self, experts_with_few_tokens=dict(scarce))
            log.warning("%s: %s", run.label(self), few_tokens_message(scarce))

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        names, _ = run.covered(self) or (set(), {})
        # A later step of the stage may have divided a layer into experts, whose masks have other names.
        masks.zero_masked_(run.model, run.masks, masks.parameters_of(run.masks, names))
        run.report(self, **sparsity.metrics(run.model, names))

    def recompute(self, case: Any) -> dict[str, Any]:
        return case.zeros()

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        where = {"layer": "within every layer", "row": "within every row", "global": "over all layers together"}
        by = " by magnitude times the norm of the input (Wanda)" if self.score == "activation" else ""
        card.paragraph(
            "Magnitude pruning" if self.score == "magnitude" else "Pruning by magnitude and activations",
            f"The {100 * self.sparsity:g} % smallest weights, ranked{by} {where[self.scope]}, are zero.",
        )
        if few := metrics.get("experts_with_few_tokens"):
            card.paragraph("Pruning by activations: experts with few tokens", few_tokens_paragraph(few))
        card.table("Sparsity after magnitude pruning", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"]))


def _rank(step: Magnitude, run: Run, names: dict[str, str], layers: Mapping[str, Any]) -> masks.Masks:
    weights = masks.MatrixWeights(run.model, names.values())
    masks.require_finite(weights, run.label(step))
    if step.scope == "row":
        return _rank_rows(step, run, weights, {own: layers[name] for name, own in names.items()})
    rank = masks.layer_masks if step.scope == "layer" else masks.global_masks
    return rank(weights, step.sparsity, run.masks)


def _rank_rows(step: Magnitude, run: Run, weights: Mapping[str, Tensor], layers: Mapping[str, Any]) -> masks.Masks:
    """Rank within the rows of each weight, whichever way the layer stores it."""
    new: masks.Masks = {}
    for own, weight in weights.items():
        layer = layers[own]
        rows = masks.as_stored(layer, weight)  # [in, out] <-> [out, in]: the same transposition
        kept = masks.mask_out_in(layer, run.masks, own)
        found = masks.row_masks({own: rows}, step.sparsity, {} if kept is None else {own: kept})
        new[own] = masks.as_stored(layer, found[own])
    return new


@hookimpl
def register_techniques(register):
    register(Magnitude)
