"""N:M sparsity: keep ``keep`` of every ``group`` consecutive weights along the input, once, and retrain as before.

``M`` maximizes ``Σ M ∘ S`` with at most ``keep`` ones in each group. Mishra et al. (2104.08378, section 4) take
``S = |W|``, prune a trained network once and repeat its training with the mask fixed. Two methods of the literature
need data, and no training; the fields ``score`` and ``compensate`` make this technique one of them:

- Wanda (Sun et al., 2306.11695, equation 1): ``score: activation``, that is ``S_ij = |W_ij| · ‖X_j‖₂``. The remaining
  weights keep their values. The recipe ``wanda-2of4``.
- SparseGPT (Frantar and Alistarh, 2301.00774): ``score: obs``, ``compensate: true``. The mask is SparseGPT's: group by
  group, the weights of the least ``w_j² / [H_j⁻¹]_jj`` (the saliency of OBS; ``H_j`` is of the columns from ``j`` on),
  after the columns before have been made up for. The recipe ``sparsegpt-2of4``. Different from the paper: once the mask
  is known, the remaining weights are fitted to the layer's dense outputs by least squares (its equation 2),
  ``min ‖(M ∘ Ŵ - W) X‖²``, of which its recursion is an approximation, since it updates only the columns behind a
  removed weight. With the same mask, the error that is minimized (with the damping) is never larger.

In both, the statistics of a layer's inputs are those after the blocks before it were pruned, as in the papers' code.

A small model does not tolerate 2:4 in every layer. With a budget, the layers whose pruning disturbs outputs least per
weight saved become N:M, and the others stay dense. Without one (the default, and in ``wanda-2of4`` and
``sparsegpt-2of4``) every layer is pruned, as in the papers; the recipe ``2of4`` has a budget of half of the weights.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_optim import (
    Contract,
    NumericalError,
    Paper,
    RecipeError,
    Reload,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.pruning import masks, nm_groups, obs_mask, sparsity
from hf_optim.toolkit.quantization import inverse_cholesky, output_error, reconstruct_weights
from hf_optim.toolkit.statistics import (
    GramMatrix,
    InputSquares,
    OutputShift,
    SecondMoment,
    TokenSample,
    augment_undersampled,
    few_tokens_message,
    few_tokens_paragraph,
    select_within_budget,
)
from hf_optim.toolkit.topology import not_reached, unprunable_experts, weight_out_in

from . import _recompute

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope


log = logging.getLogger(__name__)

CHOSEN_BY = {
    "magnitude": "magnitude",
    "activation": "magnitude times the norm of the input (Wanda)",
    "obs": "the error that their removal leaves (SparseGPT)",
}
# Rows whose masks are found at a time.
STRIP = 4096
# Name -> mean square of each input channel (None: not observed), and name -> Gram matrix.
Observed = tuple[dict[str, Tensor] | None, dict[str, GramMatrix]]


@technique(
    "nm",
    family="sparsity",
    paper=Paper("2104.08378", "Accelerating Sparse Deep Neural Networks", 2021),
    contract=Contract(
        needs={traits.FLOAT_WEIGHTS}, adds={traits.SPARSE, traits.SPARSE_NM}, keeps={traits.SPARSE, traits.SPARSE_NM}
    ),
    reload=Reload.STOCK_DENSE,
    parallel={"data": "yes"},
)
class NM(Technique):
    """Keep N of every M weights along the input (2:4): by magnitude, as Wanda does, or as SparseGPT does.

    Wanda (arXiv 2306.11695) is ``score: activation``, the recipe ``wanda-2of4``; SparseGPT (2301.00774) is ``score:
    obs`` with ``compensate: true``, the recipe ``sparsegpt-2of4``. All layers are pruned unless a ``budget`` is given;
    the recipe ``2of4`` prunes half of the weights. The pattern is kept in any training that follows.

    The mask is the best of all patterns; ties are broken by index. Layers whose input width is not a multiple of
    ``group`` stay dense and are listed in the coverage. Zeros of an earlier step stay zero.

    Attributes:
        keep: weights kept in a group (the N of N:M).
        group: consecutive input weights in a group (the M); sparse tensor cores support 2 of 4.
        score: ``"magnitude"``; ``"activation"``: magnitude times the norm of the input channel, as in Wanda (needs
            data); ``"obs"``: the error that removing a weight leaves in the layer's outputs after the others made up
            for it, as in SparseGPT (needs data).
        compensate: refit the remaining weights to the layer's dense outputs by least squares (needs data).
        damp: share of the mean diagonal of the Hessian added to its diagonal, for ``score: obs`` and ``compensate``.
        budget: share of the target weights that may become N:M, in (0, 1] (needs data); the layers with the least error
            per weight go first, and a layer that would exceed the share stays dense. None: all layers.
        scope: where the budget's share holds. ``"block"``: within each block of a blockwise run; ``"model"``: across
            the model, so that the most sensitive layers stay dense wherever they are, which needs all blocks at once
            (the driver ``whole_model``).
        sensitivity: the error that ranks layers under a budget. ``"model"``: the change of the model's output (in a
            blockwise run: of the block's) with this layer alone pruned, measured by one more forward for each layer
            and batch. ``"layer"``: relative squared error of the layer's own output, which costs no forward, but
            ignores how much of that output the rest of the block uses.
        targets: linear layers and matrices of experts, by class, name or pattern; output heads only if named exactly.
        skip: patterns of layers to leave dense.
    """

    keep: int = option(2, low=1)
    group: int = option(4, low=2)
    score: str = option("magnitude", choices=("magnitude", "activation", "obs"))
    compensate: bool = False
    damp: float = option(0.01, above=0.0, high=1.0)
    budget: float | None = option(None, above=0.0, high=1.0)
    scope: str = option("block", choices=("block", "model"))
    sensitivity: str = option("model", choices=("model", "layer"))
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    def validate(self) -> None:
        if self.keep >= self.group:
            raise RecipeError(f"nm: keep must be < group, not {self.keep} of {self.group}: that removes nothing")
        if self.scope == "model" and self.budget is None:
            raise RecipeError("nm: scope applies to a budget; set budget, a share in (0, 1], or leave scope out")

    def needs_data(self) -> bool:
        return self.score != "magnitude" or self.compensate or self.budget is not None

    def needs_whole_model(self) -> bool:
        return self.budget is not None and self.scope == "model"

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        selected = scope.select(self.targets, self.skip, experts=True)
        layers = {name: selected[name] for name in masks.weight_names(selected)}
        sizes = {name: weight_out_in(layer).numel() for name, layer in layers.items()}
        layers, skipped = nm_groups.select_divisible(layers, self.group)
        skipped |= unprunable_experts(run.model, self.targets, self.skip, inside=scope.name)
        masks.require_finite({name: weight_out_in(layer) for name, layer in layers.items()}, run.label(self))
        mean_squares, grams = yield from self._observe(run, layers)
        if mean_squares is not None:
            skipped |= not_reached(layers, mean_squares)
            layers = {name: layer for name, layer in layers.items() if name in mean_squares}
        plans = {name: self._plan(run, name, layer, mean_squares, grams) for name, layer in layers.items()}
        if self.budget is not None:
            errors = yield from self._errors(scope, layers, plans)
            chosen = select_within_budget(errors, sizes, self.budget * sum(sizes.values()))
            skipped["too sensitive for the budget"] = [name for name in layers if name not in chosen]
            plans = {name: plans[name] for name in chosen}
            run.report(self, errors={name: float(f"{error:.6g}") for name, error in errors.items()})
        self._apply(run, layers, plans)
        run.cover(self, plans, {reason: names for reason, names in skipped.items() if names})

    def _observe(self, run: Run, layers: Mapping[str, Any]) -> Generator[None, None, Observed]:
        """Collect the statistics of the layers' inputs that the fields need, in at most one pass of the data."""
        if self.compensate or self.score == "obs" or (self.budget is not None and self.sensitivity == "layer"):
            label = run.label(self)
            with TokenSample(layers, label) as sample, SecondMoment(layers, label) as grams:
                yield
            self._report_scarce(run, augment_undersampled(layers, grams, sample))
            return {name: gram.total.diagonal() for name, gram in grams.items()}, grams
        if self.score == "activation":
            observer = InputSquares(layers, run.label(self))
            with observer as mean_squares:
                yield
            self._report_scarce(run, observer.scarce)
            return mean_squares, {}
        return None, {}

    def _report_scarce(self, run: Run, scarce: Mapping[str, int]) -> None:
        if scarce:
            run.report(self, experts_with_few_tokens=dict(scarce))
            log.warning("%s: %s", run.label(self), few_tokens_message(scarce))

    def _errors(
        self, scope: Scope, layers: Mapping[str, Any], plans: Mapping[str, Plan]
    ) -> Generator[None, None, dict[str, float]]:
        """Return the error of pruning each layer alone, by which layers are ranked under a budget."""
        if self.sensitivity == "layer":
            return {name: plan.error for name, plan in plans.items()}
        with OutputShift(scope.module, {name: (layer, plans[name].weight) for name, layer in layers.items()}) as shifts:
            yield
        return shifts

    def _plan(
        self,
        run: Run,
        name: str,
        layer: Any,
        mean_squares: Mapping[str, Tensor] | None,
        grams: Mapping[str, GramMatrix],
    ) -> Plan:
        weight = weight_out_in(layer).detach()
        kept = masks.mask_out_in(layer, run.masks, masks.weight_name(name, layer))
        if self.score == "obs":
            mask = self._obs_mask(run, name, weight, grams[name].total, kept)
        else:
            score = weight.float().abs()
            if self.score == "activation" and mean_squares is not None:
                score = score * mean_squares[name].sqrt()
            mask = masks.nm_mask(score, self.keep, self.group, kept)
        if name not in grams:
            return Plan(weight * mask, mask, 0.0)
        gram = grams[name].total
        fitted = reconstruct_weights(weight, mask, gram, damp=self.damp) if self.compensate else weight * mask
        error = output_error(weight, fitted, gram)
        if not math.isfinite(error):
            raise NumericalError(
                f"{run.label(self)}: refitting {name} gave infinite or NaN values; calibrate with more samples, or "
                "leave the layer out with skip"
            )
        return Plan(fitted.to(weight.dtype), mask, error)

    def _obs_mask(self, run: Run, name: str, weight: Tensor, gram: Tensor, kept: Tensor | None) -> Tensor:
        """Return SparseGPT's mask ``[out, in]``, in strips of rows, since each holds a copy of its weights."""
        upper = inverse_cholesky(gram, self.damp, f"{run.label(self)}: the Hessian of the inputs of {name}").upper
        alive = gram.diagonal() > 0
        parts = [None] * len(weight) if kept is None else kept.split(STRIP)
        return torch.cat(
            [
                obs_mask(rows, upper, self.keep, self.group, part, alive)
                for rows, part in zip(weight.split(STRIP), parts, strict=False)
            ]
        )

    @torch.no_grad()
    def _apply(self, run: Run, layers: Mapping[str, Any], plans: Mapping[str, Plan]) -> None:
        new = {}
        for name, plan in plans.items():
            weight_out_in(layers[name]).copy_(plan.weight)
            new[masks.weight_name(name, layers[name])] = masks.as_stored(layers[name], plan.mask)
        masks.prune_(run.model, run.masks, new)
        nm_groups.record_patterns(run.nm_patterns, {name: layers[name] for name in plans}, self.keep, self.group)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        names, _ = run.covered(self) or (set(), {})
        masks.zero_masked_(run.model, run.masks, masks.parameters_of(run.masks, names))
        run.report(self, pattern=f"{self.keep}:{self.group}", **sparsity.metrics(run.model, names))

    def recompute(self, case: Any) -> dict[str, Any]:
        errors = {"errors": _recompute.nm_errors(case, self)} if self.budget is not None else {}
        return {"pattern": case.pattern(self.keep, self.group), **errors, **case.zeros()}

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics, (_, skipped) = run.reported(self), run.covered(self) or (set(), {})
        left = "".join(f" Left dense ({why}): {len(which)} layers." for why, which in sorted(skipped.items()))
        fitted = " The remaining weights were refitted to the dense layers' outputs." if self.compensate else ""
        layers = sparsity.counted_phrase(metrics)
        card.paragraph(
            f"{self.keep}:{self.group} sparsity",
            f"{layers} keep at most {self.keep} of every {self.group} consecutive weights along the "
            f"input, chosen by {CHOSEN_BY[self.score]}.{fitted}{left}",
        )
        if few := metrics.get("experts_with_few_tokens"):
            card.paragraph(f"{self.keep}:{self.group} sparsity: experts with few tokens", few_tokens_paragraph(few))
        card.table(
            f"Sparsity of the {self.keep}:{self.group} layers",
            sparsity.TABLE_HEADER,
            sparsity.table_rows(metrics["counted"]),
        )


@dataclass(frozen=True)
class Plan:
    """The pruned form of a layer, not yet applied.

    Attributes:
        weight: ``[out, in]``, in the layer's dtype.
        mask: bool ``[out, in]``, True = kept.
        error: relative squared error of the layer's output; 0 if its inputs were not observed.
    """

    weight: Tensor
    mask: Tensor
    error: float


@hookimpl
def register_techniques(register):
    register(NM)
