"""One-shot magnitude pruning: remove the weights of the smallest absolute value.

``M_ij = 1`` where ``|W_ij|`` is among the ``(1 - s) n`` largest, else 0; ``W <- M ∘ W``. Han et al. (1506.02626,
section 3.1) prune within a layer, below a threshold of ``q`` times the standard deviation of its weights; here the
share of the weights is given, and the threshold follows. Ranking over all layers together is the global variant in Gale
et al. (1902.09574), who found plain magnitude pruning a strong baseline for far costlier methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from hf_optim import Contract, Paper, Reload, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.distributed import FullWeights
from hf_optim.toolkit.pruning import masks, sparsity

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope


@technique(
    "magnitude",
    family="pruning",
    paper=Paper("1506.02626", "Learning both Weights and Connections for Efficient Neural Networks", 2015),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
)
class Magnitude(Technique):
    """Remove the smallest weights at once, and keep them removed in any training that follows.

    The count is exact, and ties are broken by index (``hf_optim.toolkit.pruning.masks``). Weights that an earlier step
    removed stay removed and count, so an N:M pattern survives.

    Attributes:
        sparsity: share of the weights to remove, in [0, 1).
        scope: ``"layer"`` removes this share from every layer, ``"global"`` from all targets together, ranked across
            layers by absolute value.
        targets: linear layers, by class, name or pattern; output heads only if named exactly, embeddings only if a
            pattern names them.
        skip: patterns of layers to leave dense.
    """

    sparsity: float = option(0.5, low=0.0, below=1.0)
    scope: str = option("layer", choices=("layer", "global"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def takes(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding) or super().takes(module)

    def needs_data(self) -> bool:
        return False

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        names = masks.weight_names(scope.select(self.targets, self.skip, embeddings=True))
        if self.scope == "layer":
            new = _rank(self, run, names)
        else:
            # Ranked once, before the first block changes: one threshold over all layers needs all of them.
            state = run.state(self)
            if not hasattr(state, "masks"):
                state.masks = _rank(self, run, masks.weight_names(run.select(self.targets, self.skip, embeddings=True)))
            new = {name: state.masks.pop(name) for name in names.values() if name in state.masks}
        masks.prune_(run.model, run.masks, new)
        run.cover(self, names)
        yield from ()

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
        how = "within every layer" if self.scope == "layer" else "over all layers together"
        card.paragraph(
            "Magnitude pruning",
            f"The {100 * self.sparsity:g} % smallest weights, ranked {how}, are zero. {sparsity.NO_SPEED_UP}",
        )
        card.table("Sparsity after magnitude pruning", sparsity.TABLE_HEADER, sparsity.table_rows(metrics["counted"]))


def _rank(step: Magnitude, run: Run, names: dict[str, str]) -> masks.Masks:
    weights = FullWeights(run.model, names.values())
    masks.require_finite(weights, run.label(step))
    rank = masks.layer_masks if step.scope == "layer" else masks.global_masks
    return rank(weights, step.sparsity, run.masks)


@hookimpl
def register_techniques(register):
    register(Magnitude)
