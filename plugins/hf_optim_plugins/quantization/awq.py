r"""AWQ: scale the input channels that activations make important, so that rounding the weights hurts them less.

    Y = (X diag(s)^-1) (diag(s) W^T),     s_j = (mean |X_j|)^a,     a = argmin over [0, 1) of L(a)
    L(a) = E |X W^T - X diag(s)^-1 Q(diag(s) W^T)|^2

A weight that is multiplied by s_j > 1 before it is rounded has an error that is smaller by as much, as long as the
scale of its group hardly grows. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and
Acceleration", arXiv 2306.00978, equations 4 and 5: 20 values of a, s divided by sqrt(max s min s) as in the authors'
code. 1/s is folded into the norm that feeds the layers, or into the rows of the linear layer before, where that is
exact: the model computes what it did. Then the range of each group of weights is clipped (``clip``): of the shares 1 to
0.5 of its range the one with the smallest error of the output is kept, and weights beyond it are set to its end. That
changes the model.

The errors are those of the outputs of linear layers, ``tr(D G D^T)`` with the Gram matrix G of the inputs and the
change D of the weights, added over the layers that read one input; the authors measure the output of attention for
query, key and value. They leave the ranges of query and key as they are; here their own error decides.

On its own it makes nothing smaller, so a recipe must quantize after it: with the bits, groups and zero points that are
set here, and ``observer: minmax``, which keeps the clipped ranges.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim import Card, Contract, Paper, Reload, Run, Scope, Technique, hookimpl, option, technique, traits
from hf_optim.toolkit.permutation import folding, scale_bounds
from hf_optim.toolkit.quantization import GridSpec, group_by_scale, qparams_from_range, round_codes
from hf_optim.toolkit.statistics import ChannelAbsMax, ChannelAbsMean, SecondMoment
from hf_optim.toolkit.topology import NOT_REACHED, weight_out_in

from . import _recompute_folded
from ._scale_plan import Plan, make_plan, wiring
from ._weights import weight_spec

POINTS = 20  # values of a
SHARES = tuple(1 - 0.05 * number for number in range(11))  # of a range


@technique(
    "awq",
    family="quantization",
    paper=Paper("2306.00978", "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2024),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, owes={traits.QUANTIZED}, keeps={traits.SPARSE, traits.SPARSE_NM}),
    reload=Reload.STOCK_DENSE,
)
class AWQ(Technique):
    """Fold scales into norms and neighbouring layers that protect the weights of important input channels.

    Attributes:
        bits: of the weights in the step that quantizes, which the search assumes (``group_size`` and ``symmetric``
            likewise).
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it. None: one scale per
            output channel.
        symmetric: no zero points.
        clip: also clip the range of each group of weights.
        pairs: also scale the inputs that come from another linear layer, where that is exact.
        targets: linear layers, by class, name or pattern.
        skip: patterns of layers to leave out; those that share a norm with one of them take no scale either.
    """

    bits: int = option(4, low=2, high=8)
    group_size: int | None = option(128, low=1)
    symmetric: bool = True
    clip: bool = True
    pairs: bool = True
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"bits": 3, "group_size": 16})

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        selected = scope.select(self.targets, self.skip)
        groups, pairs = wiring(self, run, scope)
        plan = make_plan(selected, groups, pairs if self.pairs else ())
        label = run.label(self)
        observed = selected if self.clip else plan.observed
        with (
            ChannelAbsMax(plan.observed, label) as peaks,
            ChannelAbsMean(plan.observed, label) as means,
            SecondMoment(observed, label) as grams,
        ):
            if observed:
                yield
        inputs = {name: gram.total.clone() for name, gram in grams.items()}
        scales = self._scale(plan, peaks, means, inputs)
        clipped = self._clip(selected, inputs) if self.clip else set()
        reached = {name for name in selected if name in inputs}
        skipped = {reason: names - clipped for reason, names in plan.skipped.items() if names - clipped}
        if missed := {name for name in observed if name not in reached}:
            skipped[NOT_REACHED] = missed
        scaled = {n for group in plan.groups for n in group.linears} | {pair.consumer for pair in plan.pairs}
        scaled |= {pair.producer for pair in plan.pairs}
        run.cover(self, ((scaled & reached) | clipped) - missed, skipped)
        known = run.reported(self)
        run.report(
            self,
            norms=known.get("norms", 0) + sum(name in reached for name in map(_reader, plan.groups)),
            pairs=known.get("pairs", 0) + sum(pair.consumer in reached for pair in plan.pairs),
            largest_ratio=float(f"{max([known.get('largest_ratio', 1.0), *scales]):.6g}"),
        )

    def _scale(
        self, plan: Plan, peaks: Mapping[str, Tensor], means: Mapping[str, Tensor], inputs: dict[str, Tensor]
    ) -> list[float]:
        """Move the scales, and divide ``inputs`` by them; return for each norm the largest scale over the smallest."""
        ratios = []
        for pair in plan.pairs:
            name = pair.consumer
            if name not in inputs:
                continue
            weight = weight_out_in(pair.consumer_module).detach()
            own = folding.max_over_columns(pair, means[name])
            rows = self._search([weight], inputs[name], own, lambda s, pair=pair: folding.expand_to_columns(pair, s))
            rows = scale_bounds.bound_pair_scale(pair, rows, folding.max_over_columns(pair, peaks[name]))
            folding.move_pair_scale_(pair, rows)
            _divide(inputs, [name], folding.expand_to_columns(pair, rows))
        for group in plan.groups:
            name = _reader(group)
            if name not in inputs:
                continue
            weights = [weight_out_in(module).detach() for module in group.linears.values()]
            scale = self._search(weights, inputs[name], means[name], lambda s: s)
            scale = scale_bounds.bound_norm_scale(group, scale, peaks[name])
            folding.move_norm_scale_(group, scale)
            _divide(inputs, group.linears, scale)
            ratios.append(float(scale.max() / scale.min()))
        return ratios

    def _search(self, weights: Sequence[Tensor], gram: Tensor, means: Tensor, expand: Any) -> Tensor:
        """Return the scale ``[channels]`` of the exponent with the smallest error, float64; ones without any input."""
        best, found = float("inf"), torch.ones_like(means, dtype=torch.float64)
        for number in range(POINTS):
            scale = channel_scale(means, number / POINTS)
            wide = expand(scale).to(gram)
            error = sum(output_loss(w.to(gram), gram, wide, self._spec(w)) for w in weights)
            if error < best:
                best, found = error, scale
        return found

    def _clip(self, selected: Mapping[str, nn.Module], inputs: Mapping[str, Tensor]) -> set[str]:
        """Clip the weights of the layers whose inputs were seen; return their names."""
        done = set()
        for name, module in selected.items():
            # A weight of two layers is clipped once, by the inputs of the first.
            own = id(module.weight)
            if name in inputs and own not in done:
                done.add(own)
                weight = weight_out_in(module)
                with torch.no_grad():
                    weight.copy_(clipped(weight.detach(), inputs[name], self._spec(weight)))
        return set(selected) & set(inputs)

    def _spec(self, weight: Tensor) -> GridSpec:
        return weight_spec(weight.shape[1], self.bits, self.group_size, self.symmetric)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_folded.awq(case, self)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        clipping = ", and the ranges of groups of weights were clipped by the error of the outputs" if self.clip else ""
        card.paragraph(
            "AWQ",
            f"Before the weights were rounded to {self.bits} bits, the input channels of the layers behind "
            f"{metrics['norms']} norms and of {metrics['pairs']} pairs of layers were scaled by powers of the mean "
            f"magnitude of their activations{clipping}.",
        )


def _reader(group: Any) -> str:
    return next(iter(group.linears))


def _divide(inputs: dict[str, Tensor], names: Any, scale: Tensor) -> None:
    """Divide the inputs behind the Gram matrices of some layers by a scale."""
    for name in names:
        if name in inputs:
            inverse = scale.to(inputs[name]).reciprocal()
            inputs[name] = inputs[name] * inverse * inverse[:, None]


def channel_scale(means: Tensor, exponent: float) -> Tensor:
    """Return ``s = means^exponent``, divided by ``sqrt(max s min s)``: float64 ``[channels]``; 1 where a mean is 0."""
    scale = means.double().pow(exponent).clamp_min(1e-4).masked_fill(means == 0, 1.0)
    return scale / (scale.max() * scale.min()).sqrt()


def rounded(weight: Tensor, spec: GridSpec, share: float = 1.0) -> Tensor:
    """Return the weights on the grid of ``share`` of the range of each group, in the shape and dtype of ``weight``."""
    parts = group_by_scale(weight, spec)
    low, high = torch.aminmax(parts, dim=-1)
    scale, zero = qparams_from_range(low * share, high * share, spec, weight.dtype)
    shift = torch.zeros_like(scale) if zero is None else zero.to(scale)
    codes = round_codes(parts, scale.unsqueeze(-1), shift.unsqueeze(-1), spec)
    return ((codes - shift.unsqueeze(-1)) * scale.unsqueeze(-1)).reshape(weight.shape)


def output_loss(weight: Tensor, gram: Tensor, scale: Tensor, spec: GridSpec) -> float:
    """Return ``sum |x W^T - (x / s) Q(s W)^T|^2`` over the inputs.

    Args:
        weight: ``[out, in]``, the dtype of ``gram``.
        gram: ``[in, in]``, the sum of ``x x^T``.
        scale: ``[in]``.
        spec: the kind of grid.
    """
    change = rounded(weight * scale, spec) / scale - weight
    return float(((change @ gram) * change).sum())


def clipped(weight: Tensor, gram: Tensor, spec: GridSpec) -> Tensor:
    """Return the weights with each group's range clipped to the share with the smallest error of its own outputs.

    Args:
        weight: ``[out, in]``, any float type.
        gram: ``[in, in]``, the sum of ``x x^T``; of a group, the part of its own inputs counts.
        spec: the kind of grid.
    """
    wide = weight.to(gram.dtype)
    parts = group_by_scale(wide, spec)
    size = parts.shape[-1]
    blocks = torch.stack([gram[i : i + size, i : i + size] for i in range(0, len(gram), size)])
    best, kept = None, torch.ones(parts.shape[:-1], dtype=wide.dtype, device=wide.device)
    for share in SHARES:
        change = group_by_scale(rounded(wide, spec, share) - wide, spec)
        error = (torch.einsum("ogi,gij->ogj", change, blocks) * change).sum(-1)
        if best is None:
            best = error
            continue
        better = error < best
        best, kept = torch.where(better, error, best), torch.where(better, share, kept)
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(parts, dim=-1))
    shares = kept.unsqueeze(-1)
    if spec.symmetric:
        high = torch.maximum(high, -low)
        low = -high
    return parts.clamp(low * shares, high * shares).reshape(weight.shape).to(weight.dtype)


@hookimpl
def register_techniques(register) -> None:
    register(AWQ)
