"""Channel permutations: reorder the input channels of linear layers so that an N:M mask keeps more.

    P* = argmax_P  Σ_rows Σ_groups  (sum of the N largest of each M in S P),      W x = (W P) (P^T x)

An N:M mask chooses within groups of M neighbours, so it loses where large weights happen to be neighbours. The input
channels of W are permuted by P, and the rows of the layers that produce x by the same order, which leaves the model's
function unchanged. S is ``|W|``, or ``|W_ij| ‖X_j‖₂`` for a mask that is chosen by activations.

The permutations that are exact are found on the wiring of the model: the neurons of a feed-forward layer (rows of up
and gate, columns of down), the value channels of each key/value head (rows of the value projection, columns of the
output projection under all its query heads), and one order of the residual stream, the best for the sum over all layers
that read it. Queries and keys are not permuted: their rows are not inputs of a linear layer, and rotary positions tie
each channel to its index. Where a model returns its residual stream, or a router or fused experts read a channel, that
channel is moved with all its readers or not at all. The outputs on a small batch are compared before and after.

The search is that of Pool and Yu, "Channel Permutations for N:M Sparsity", NeurIPS 2021 (no arXiv number;
https://proceedings.neurips.cc/paper/2021/hash/6e8404c3b93a9527c8db241a1846599a-Abstract.html): all splits of two or
three stripes, best gain first, then bounded regressions. Ours starts narrow matrices from many orders instead of one,
and searches wide ones by exchanges of columns. The sum that a mask keeps is a proxy for quality, not the same thing:
where 2:4 all but destroys a small model, one of two equally good orders can leave it with a much higher loss than the
other.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hf_optim import (
    Contract,
    ModelError,
    NumericalError,
    RecipeError,
    Reload,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import main_output, relative_difference, rounding_tolerance
from hf_optim.toolkit.permutation import SITE_KINDS, Site, find_sites, kept_sum, kept_sum_row_wise, search_permutation
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.statistics import InputSquares, few_tokens_message
from hf_optim.toolkit.topology import weight_out_in

from . import _recompute

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope

log = logging.getLogger(__name__)
# Most scores that a search examines, by device; for larger sites it takes a random sample of the rows.
MAX_SCORES = {"cpu": 2**23, "cuda": 2**27}


@technique(
    "channel_permutation",
    family="sparsity",
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, forbids={traits.SPARSE_NM}, keeps={traits.SPARSE}),
    reload=Reload.STOCK_DENSE,
)
class ChannelPermutation(Technique):
    """Reorder input channels so that the N:M mask of a later step keeps more, without changing the model's function.

    The kept sum over the layers that read the channels never falls: an order that is not better is not used. Masks of
    an earlier step are permuted too, but N:M masks would be broken, so their step must come later.

    Attributes:
        where: which channels: ``"neurons"``, ``"values"``, ``"residual"``.
        keep: weights that the later mask keeps in a group (the N of N:M).
        group: consecutive input weights in a group (the M).
        score: that of the later mask: ``"magnitude"``, or ``"activation"``: magnitude times the norm of the input
            channel (needs data).
        stripes: how many groups are split again at once, 2 or 3; three only for matrices of at most 84 columns.
        tries: regressions from the order found; fewer for a matrix of more than 84 columns, where they are costly, and
            none for one of more than 256 groups.
        starts: number of orders from which the search of a matrix of at most 84 columns starts.
        seed: of the search.
        targets: the linear layers that will be N:M, by class, name or pattern; output heads only if named exactly.
        skip: patterns of layers that will stay dense: they are permuted if other layers require it, and do not count.
    """

    where: tuple[str, ...] = SITE_KINDS
    keep: int = option(2, low=1)
    group: int = option(4, low=2)
    score: str = option("magnitude", choices=("magnitude", "activation"))
    stripes: int = option(2, low=2, high=3)
    tries: int = option(100, low=0)
    starts: int = option(64, low=1)
    seed: int = option(0, low=0)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"tries": 0, "starts": 8})

    def validate(self) -> None:
        if self.keep >= self.group:
            raise RecipeError(f"channel_permutation: keep must be < group, not {self.keep} of {self.group}")
        for kind in self.where:
            if kind not in SITE_KINDS:
                raise RecipeError(
                    f"channel_permutation: where must be among {', '.join(SITE_KINDS)}, not {kind!r}; the rows of "
                    "queries and keys are not inputs of a linear layer, and under rotary positions another order would "
                    "change the model"
                )
        if not self.where:
            raise RecipeError(f"channel_permutation: where must name at least one of {', '.join(SITE_KINDS)}")

    def needs_data(self) -> bool:
        return self.score == "activation"

    def needs_whole_model(self) -> bool:
        return True

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        selected = scope.select(self.targets, self.skip, experts=True)
        layers = {name: selected[name] for name in masks.weight_names(selected)}
        masks.require_finite({name: weight_out_in(layer) for name, layer in layers.items()}, run.label(self))
        norms: dict[str, Tensor] | None = None
        if self.score == "activation":
            observer = InputNorm(layers, run.label(self))
            with observer as norms:
                yield
            if observer.scarce:
                run.report(self, experts_with_few_tokens=dict(observer.scarce))
                log.warning("%s: %s", run.label(self), few_tokens_message(observer.scarce))
        permutation = _Permutation(self, run, layers, norms)
        permutation.apply(*self._sites(run))
        run.cover(self, permutation.readers, {why: names for why, names in permutation.skipped.items() if names})
        permutation.report()

    def _sites(self, run: Run) -> tuple[list[Site], dict[str, list[str]]]:
        try:
            return find_sites(run.model, self.where)
        except (ValueError, RuntimeError) as error:
            raise ModelError(f"{run.label(self)}: the wiring of the model cannot be traced: {error}") from error

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute.channel_permutation(case, self)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        experts = any(".experts." in name for name in metrics["kept_before_by_layer"])
        kind = "linear layers and matrices of experts" if experts else "linear layers"
        unused = card.when("No step of this recipe made such a mask.", lacks=[traits.SPARSE_NM])
        card.paragraph(
            "Channel permutations",
            f"The input channels of {metrics['layers_permuted']} {kind} were reordered for "
            f"{self.keep}:{self.group} pruning ({', '.join(self.where)}; Pool and Yu, NeurIPS 2021), which does not "
            f"change the function of the model. A {self.keep}:{self.group} mask by {self.score} of the reordered "
            f"layers keeps {100 * metrics['kept_after']:.2f} % of their scores instead of "
            f"{100 * metrics['kept_before']:.2f} %, which recovers {100 * metrics['efficacy']:.1f} % of what the "
            f"groups lose against pruning each row freely.{unused}",
        )


@dataclass(eq=False)
class _Permutation:
    """The search for, and application of, permutations in one model.

    Attributes:
        step, run: the step and its run.
        layers: name -> layer that will be N:M.
        norms: name -> norm of each input channel, or None for magnitudes.
        readers: the layers that read channels which may be permuted.
        moved: those whose input channels were reordered.
        skipped: reason -> names of the channels or layers left out.
        orders: number of orders searched, and of those that were better and are used.
        gap: largest change of an output, relative to the largest output.
        before: result of ``_measure`` before anything was permuted.
    """

    step: ChannelPermutation
    run: Run
    layers: dict[str, Any]
    norms: dict[str, Tensor] | None
    readers: list[str] = field(default_factory=list)
    moved: set[str] = field(default_factory=set)
    skipped: dict[str, list[str]] = field(default_factory=dict)
    orders: tuple[int, int] = (0, 0)
    gap: float = 0.0
    before: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def apply(self, found: list[Site], refused: Mapping[str, list[str]]) -> None:
        """Search and apply the order of every site, and check that the model's outputs do not change.

        Raises:
            ModelError: if no site can be permuted.
            NumericalError: if the outputs change by more than rounding; the permutations are then undone.
        """
        step, run = self.step, self.run
        self.skipped.update(refused)
        if self.norms is not None:
            self.skipped |= topology.not_reached(self.layers, self.norms)
            self.layers = {name: layer for name, layer in self.layers.items() if name in self.norms}
        usable = [site for site in found if self._is_usable(site)]
        if not usable:
            why = topology.summarize(self.skipped)
            raise ModelError(
                f"{run.label(step)}: {type(run.model).__name__} has no channels of {', '.join(step.where)} that can be "
                f"permuted{f' ({why})' if why else ''}"
            )
        self.readers = list(dict.fromkeys(name for site in usable for name in site.readers if name in self.layers))
        self.before = self._measure()
        inputs = topology.dummy_inputs(run.model)
        expected = main_output(run.model, inputs)
        applied = [(site, order) for site in usable if (order := self._permute_(site)) is not None]
        gap = relative_difference(main_output(run.model, inputs), expected)
        if not gap <= rounding_tolerance(run.model):
            for site, order in reversed(applied):
                site.permute_(run.model, order.argsort(), run.masks)
            raise NumericalError(
                f"{run.label(step)}: permuting channels of {type(run.model).__name__} changes its outputs by {gap:.1e} "
                "of the largest, so it was undone; name fewer kinds in where"
            )
        self.orders, self.gap = (len(usable), len(applied)), gap

    def _is_usable(self, site: Site) -> bool:
        group = self.step.group
        if not any(name in self.layers for name in site.readers):
            return False
        if not site.fits_groups(group):
            reason = f"its {site.width} channels do not fill groups of {group}"
            self.skipped.setdefault(reason, []).append(site.name)
            return False
        return True

    def _permute_(self, site: Site) -> Tensor | None:
        """Search an order and apply it; return None if none is better than the current one."""
        step, readers = self.step, [name for name in site.readers if name in self.layers]
        options = {"stripes": step.stripes, "tries": step.tries, "starts": step.starts, "seed": step.seed}
        order = search_permutation(self._sample(site, readers), step.keep, step.group, **options).order
        gained = sum(
            kept_sum(columns[:, order.to(columns.device)], step.keep, step.group)
            - kept_sum(columns, step.keep, step.group)
            for columns in self._columns(site, readers)
        )
        if gained <= 0:
            return None
        site.permute_(self.run.model, order, self.run.masks)
        for name in readers if self.norms is not None else ():
            for columns in site.columns:
                self.norms[name][columns] = self.norms[name][columns[order]]  # type: ignore[index]
        self.moved.update(readers)
        return order

    def _columns(self, site: Site, readers: list[str]) -> Iterator[Tensor]:
        """Yield the scores ``[rows, channels]`` of every reader, once for each of its sets of columns."""
        for name in readers:
            scores = self.scores(name)
            for columns in site.columns:
                yield scores[:, columns.to(scores.device)]

    def _sample(self, site: Site, readers: list[str]) -> Tensor:
        """Return the scores of all readers, concatenated along the rows, or of a random sample of ``MAX_SCORES``."""
        total = sum(len(weight_out_in(self.layers[name])) for name in readers) * len(site.columns)
        generator = torch.Generator().manual_seed(self.step.seed)
        parts = []
        for part in self._columns(site, readers):
            share = MAX_SCORES.get(part.device.type, MAX_SCORES["cpu"]) / (total * site.width)
            if share < 1.0:
                rows = torch.randperm(len(part), generator=generator)[: max(1, int(len(part) * share))]
                part = part[rows.to(part.device)]
            parts.append(part)
        return torch.cat(parts)

    def scores(self, name: str) -> Tensor:
        """Return the scores of a layer, float32 ``[out, in]`` on the device of the run."""
        weight = weight_out_in(self.layers[name]).detach()
        scores = weight.to(self.run.device or weight.device).float().abs()
        return scores if self.norms is None else scores * self.norms[name].to(scores.device)

    def _measure(self) -> dict[str, tuple[float, float, float]]:
        """Return for each layer the sum a mask keeps, the sum it would keep of whole rows, and that of all scores."""
        pattern, found = (self.step.keep, self.step.group), {}
        for name in self.readers:
            scores = self.scores(name)
            found[name] = (
                kept_sum(scores, *pattern),
                kept_sum_row_wise(scores, *pattern),
                float(scores.sum(dtype=torch.float64)),
            )
        return found

    def report(self) -> None:
        """Record the sum that a mask keeps of each layer before and after, as shares of the layer's scores."""
        after = self._measure()
        kept = {name: (self.before[name][0], after[name][0], *after[name][1:]) for name in self.readers}
        old, new, rows, total = (sum(column) for column in zip(*kept.values(), strict=True))
        self.run.report(
            self.step,
            pattern=f"{self.step.keep}:{self.step.group}",
            orders_searched=self.orders[0],
            orders_used=self.orders[1],
            layers_permuted=len(self.moved),
            kept_before=round(old / total, 6) if total else 0.0,
            kept_after=round(new / total, 6) if total else 0.0,
            efficacy=round((new - old) / (rows - old), 6) if rows > old else 0.0,
            output_difference=float(f"{self.gap:.3g}"),
            kept_before_by_layer={name: round(v[0] / v[3], 6) for name, v in kept.items() if v[3]},
            kept_after_by_layer={name: round(v[1] / v[3], 6) for name, v in kept.items() if v[3]},
            efficacy_by_layer={
                name: round((v[1] - v[0]) / (v[2] - v[0]), 6) for name, v in kept.items() if v[2] > v[0]
            },
        )


class InputNorm(InputSquares):
    """The norm ``‖X_j‖₂`` over all tokens of each input channel: name -> float32 ``[in_features]``."""

    def complete(self) -> None:
        super().complete()
        self.found.update({name: mean_square.sqrt() for name, mean_square in self.found.items()})


@hookimpl
def register_techniques(register):
    register(ChannelPermutation)
