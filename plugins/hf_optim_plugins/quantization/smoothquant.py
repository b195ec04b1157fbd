"""SmoothQuant: move the difficulty of quantizing activations into the weights, without changing the model's function.

    Y = (X diag(s)^-1) (diag(s) W^T),        s_j = max|X_j|^alpha / max|W_:j|^(1 - alpha)

A few input channels of a transformer's linear layers are a hundred times larger than the others, and degrade the single
scale that 8-bit activations have per tensor or token. Dividing channel j of X by s_j and multiplying column j of W by
it leaves Y unchanged. 1/s is folded into the layer that produces X: the gain (and bias) of the norm that the linears
read, and, where it is exact, the rows of the preceding linear: value -> output projection, up -> down projection,
fc1 -> fc2 through ReLU. Scales are clamped to what the model's dtype can hold on both sides, which matters in half
precision only.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv
2211.10438. (The reference list of the survey that this collection follows gives it the title of another paper.) The
paper smooths the inputs that come from norms, as ``pairs: false`` does; those that come from a linear are an addition.

On its own it makes nothing smaller, so a recipe must quantize after it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim import Contract, Paper, Reload, Run, Scope, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding, scale_bounds
from hf_optim.toolkit.statistics import ChannelAbsMax
from hf_optim.toolkit.topology import weight_out_in

from . import _recompute_folded
from ._scale_plan import Plan, make_plan, wiring


@technique(
    "smoothquant",
    family="quantization",
    paper=Paper(
        "2211.10438", "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022
    ),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, owes={traits.QUANTIZED}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
    parallel={"calibration": "yes"},
)
class SmoothQuant(Technique):
    """Fold scales into norms and neighbouring layers that make activations easy to quantize.

    Attributes:
        alpha: share of the difficulty that moves to the weights, from 0 (none of the activations') to 1 (all of it).
            0.5 is the paper's; 0.75 and more suit models with stronger outliers.
        pairs: also smooth the inputs that come from another linear layer, where that is exact.
        targets: linear layers to smooth, by class, name or pattern.
        skip: patterns of layers to leave out; those that share a norm with one of them are left out too.
    """

    alpha: float = option(0.5, low=0.0, high=1.0)
    pairs: bool = True
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        selected = scope.select(self.targets, self.skip)
        groups, pairs = wiring(self, run, scope)
        plan = make_plan(selected, groups, pairs if self.pairs else ())
        with ChannelAbsMax(plan.observed, run.label(self)) as peaks:
            if plan.observed:
                yield
        smoothed = apply(plan, peaks, self.alpha)
        run.cover(self, smoothed.covered, smoothed.skipped)
        self._report(run, smoothed)

    def _report(self, run: Run, smoothed: Smoothed) -> None:
        """Add the counts of a scope to the record, and the largest ratios of absmax to median so far."""
        if not smoothed.ratios:
            return
        before, after = (round(max(column), 3) for column in zip(*smoothed.ratios, strict=True))
        reported = run.reported(self)
        run.report(
            self,
            norms=reported.get("norms", 0) + smoothed.norms,
            pairs=reported.get("pairs", 0) + smoothed.pairs,
            peak_over_median_before=max(before, reported.get("peak_over_median_before", before)),
            peak_over_median_after=max(after, reported.get("peak_over_median_after", after)),
        )

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_folded.smoothquant(case, self)


@dataclass
class Smoothed:
    """The result of smoothing one scope.

    Attributes:
        norms, pairs: how many of each took a scale.
        covered: names of the linears whose weights changed.
        skipped: reason -> names of selected linears that were not smoothed.
        ratios: for each smoothed input, the absmax of its largest channel over that of its median channel, before and
            after.
    """

    norms: int = 0
    pairs: int = 0
    covered: set[str] = field(default_factory=set)
    skipped: dict[str, set[str]] = field(default_factory=dict)
    ratios: list[tuple[float, float]] = field(default_factory=list)


def apply(plan: Plan, peaks: dict[str, Tensor], alpha: float) -> Smoothed:
    """Move the scales. Pairs first, since they change rows of layers whose columns determine a norm's scale."""
    smoothed = Smoothed(skipped={reason: set(names) for reason, names in plan.skipped.items()})
    for pair in plan.pairs:
        peak = peaks.get(pair.consumer)
        if peak is None:
            smoothed.skipped.setdefault(topology.NOT_REACHED, set()).add(pair.consumer)
            continue
        own = folding.max_over_columns(pair, peak)
        columns = folding.max_over_columns(pair, column_peak([pair.consumer_module]).to(peak))
        rows = scale_bounds.bound_pair_scale(pair, smoothing_scale(own, columns, alpha), own)
        folding.move_pair_scale_(pair, rows)
        smoothed.pairs += 1
        smoothed.covered |= {pair.producer, pair.consumer}
        smoothed.ratios.append((max_over_median(peak), max_over_median(peak / folding.expand_to_columns(pair, rows))))
    for group in plan.groups:
        peak = peaks.get(next(iter(group.linears)))
        if peak is None:
            smoothed.skipped.setdefault(topology.NOT_REACHED, set()).update(group.linears)
            continue
        scale = smoothing_scale(peak, column_peak(group.linears.values()).to(peak), alpha)
        scale = scale_bounds.bound_norm_scale(group, scale, peak)
        folding.move_norm_scale_(group, scale)
        smoothed.norms += 1
        smoothed.covered |= set(group.linears)
        smoothed.ratios.append((max_over_median(peak), max_over_median(peak / scale)))
    return smoothed


def smoothing_scale(input_peak: Tensor, weight_peak: Tensor, alpha: float) -> Tensor:
    """Return ``s = max|X|^alpha / max|W|^(1 - alpha)`` per channel, ``[channels]``; 1 for a channel of zeros."""
    dead = (input_peak == 0) | (weight_peak == 0)
    scale = input_peak.double().pow(alpha) / weight_peak.double().clamp_min(torch.finfo(torch.float64).tiny).pow(
        1 - alpha
    )
    return scale.clamp(1e-5, 1e5).masked_fill(dead, 1.0)


def column_peak(modules: Iterable[nn.Module]) -> Tensor:
    """Return the largest absolute weight of each input channel over linears that read one input: float32 ``[in]``."""
    return torch.stack([weight_out_in(module).detach().abs().amax(0).float() for module in modules]).amax(0)


def max_over_median(peak: Tensor) -> float:
    """Return the largest over the median channel absmax: the range that one scale for all channels has to cover."""
    return float(peak.max() / peak.median().clamp_min(torch.finfo(torch.float32).tiny))


@hookimpl
def register_techniques(register) -> None:
    register(SmoothQuant)
