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

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_optim import Contract, Paper, RecipeError, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.distributed import FullWeights
from hf_optim.toolkit.pruning import masks, sparsity
from hf_optim.toolkit.statistics import HessianDiagonal
from hf_optim.toolkit.topology import not_reached, weight_out_in

if TYPE_CHECKING:
    from torch import Tensor

    from hf_optim import Card, Run, Scope


@technique(
    "magnitude",
    family="pruning",
    paper=Paper("1506.02626", "Learning both Weights and Connections for Efficient Neural Networks", 2015),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
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
        targets: linear layers, by class, name or pattern; output heads only if named exactly, embeddings only if a
            pattern names them, and only under ``score: magnitude``.
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
        selected = scope.select(self.targets, self.skip, embeddings=self.score == "magnitude")
        names = masks.weight_names(selected)
        skipped: dict[str, list[str]] = {}
        if self.score == "activation":
            layers = {name: selected[name] for name in names}
            with HessianDiagonal(layers, run.label(self)) as mean_squares:
                yield
            skipped = not_reached(layers, mean_squares)
            names = {name: parameter for name, parameter in names.items() if name in mean_squares}
            new = self._rank_by_inputs(run, {name: layers[name] for name in names}, mean_squares)
        elif self.scope != "global":
            new = _rank(self, run, names)
        else:
            # Ranked once, before the first block changes: one threshold over all layers needs all of them.
            state = run.state(self)
            if not hasattr(state, "masks"):
                state.masks = _rank(self, run, masks.weight_names(run.select(self.targets, self.skip, embeddings=True)))
            new = {name: state.masks.pop(name) for name in names.values() if name in state.masks}
        masks.prune_(run.model, run.masks, new)
        run.cover(self, names, skipped)
        yield from ()

    def _rank_by_inputs(
        self, run: Run, layers: Mapping[str, nn.Module], mean_squares: Mapping[str, Tensor]
    ) -> masks.Masks:
        """Return parameter name -> mask, in the layout of the parameter, by Wanda's score."""
        new: masks.Masks = {}
        for name, layer in layers.items():
            parameter, weight = f"{name}.weight", weight_out_in(layer).detach()
            masks.require_finite({parameter: weight}, run.label(self))
            score = weight.float().abs() * mean_squares[name].sqrt()
            kept = masks.mask_out_in(layer, run.masks, parameter)
            earlier = {} if kept is None else {parameter: kept}
            rank = masks.row_masks if self.scope == "row" else masks.layer_masks
            new[parameter] = masks.as_stored(layer, rank({parameter: score}, self.sparsity, earlier)[parameter])
        return new

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        names, _ = run.covered(self) or (set(), {})
        masks.zero_masked_(run.model, run.masks, [f"{name}.weight" for name in names])
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
        card.table("Sparsity after magnitude pruning", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"]))


def _rank(step: Magnitude, run: Run, names: dict[str, str]) -> masks.Masks:
    weights = FullWeights(run.model, names.values())
    masks.require_finite(weights, run.label(step))
    if step.scope == "row":
        return _rank_rows(step, run, weights, {parameter: name for name, parameter in names.items()})
    rank = masks.layer_masks if step.scope == "layer" else masks.global_masks
    return rank(weights, step.sparsity, run.masks)


def _rank_rows(step: Magnitude, run: Run, weights: Mapping[str, Tensor], layers: dict[str, str]) -> masks.Masks:
    """Rank within the rows of each weight, whichever way the layer stores it."""
    new: masks.Masks = {}
    for parameter, weight in weights.items():
        layer = run.model.get_submodule(layers[parameter])
        rows = masks.as_stored(layer, weight)  # [in, out] <-> [out, in]: the same transposition
        kept = masks.mask_out_in(layer, run.masks, parameter)
        found = masks.row_masks({parameter: rows}, step.sparsity, {} if kept is None else {parameter: kept})
        new[parameter] = masks.as_stored(layer, found[parameter])
    return new


@hookimpl
def register_techniques(register):
    register(Magnitude)
