r"""Rotations: spread outliers over all channels by orthogonal matrices that leave the model's function unchanged.

    x' = x Q,     W_read' = W_read Q,     W_write' = Q^T W_write,     E' = E Q             (the residual stream)
    v' = v R_h,   W_v' = R_h^T W_v,       W_o' = W_o R_h                                   (the values of head h)

A few channels of a transformer's activations are a hundred times larger than the others, and the grid of a token must
span them. A Hadamard matrix with random signs spreads each channel evenly over all, so that 8 and even 4 bits a token
suffice: QuaRot (Ashkboos et al., 2404.00456). Learned rotations (SpinQuant, Liu et al., 2405.16406) begin there, and
move along the manifold of orthogonal matrices by Cayley steps on the loss of the model with its quantizers simulated;
the best state is kept, so the loss on the calibration data is never above that of the start.

RMSNorm commutes with any Q once its gain has moved into the weights behind it. LayerNorm also subtracts the mean: here
Q then keeps the mean (``Q 1 = 1``), so that the stock norm stays; the papers replace LayerNorm by RMSNorm. A residual
stream that passes through a norm with a gain (post-norm models), to which such a norm's output is added, or that the
model returns, cannot be rotated; its values can. An output head that shares the embedding's weight takes the last
norm's gain, so it is untied.

Learned rotations match the outputs of the model as it was (``KL(p || q)``); SpinQuant takes the loss of the next token.
Weights and inputs are rounded in its forward, or one of both.

Folded rotations cost nothing at run time. On their own they make nothing smaller, so a recipe must quantize after them.
Inputs of 8 bits run on int8 kernels where weights have a scale per output channel. Those of 4 bits are rounded and
multiplied in floating point, on every device: what is shown of W4A4 here is its quality, not the papers' speed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from hf_optim import (
    Card,
    Contract,
    ModelError,
    NumericalError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Scope,
    Technique,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit import topology
from hf_optim.toolkit.modules import main_output, relative_difference, rounding_tolerance
from hf_optim.toolkit.permutation import orthogonal, rotating
from hf_optim.toolkit.statistics import RecordedBatches, sample_microbatches
from hf_optim.toolkit.topology import StreamRotation, ValueHeads

from . import _recompute_folded, _rotated_inputs
from ._rotation_fit import RotationFit, Simulated

SITES = ("residual", "values")
EVALUATED = 8  # microbatches that the loss is measured on, at most


@technique(
    "rotation",
    family="quantization",
    paper=Paper("2404.00456", "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", 2024),
    contract=Contract(needs={traits.FLOAT_WEIGHTS}, owes={traits.QUANTIZED}),
    reload=Reload.STOCK_DENSE,
)
class Rotation(Technique):
    """Rotate the residual stream and the values of attention, folded into the weights.

    Attributes:
        where: what is rotated: ``"residual"`` (the residual stream), ``"values"`` (the values of each head).
        online: also rotate the inputs of the layers behind activation functions (down projections) at run time, by
            Hadamard transforms of blocks of neighbouring channels: the largest power of two that divides the width, or
            two that overlap if that is under 256. The checkpoint then carries its code. Inputs of stacked experts stay.
        queries_and_keys: also rotate the queries and keys of each head at run time, behind the rotary embedding, for
            caches of few bits; the checkpoint then carries its code. Scores stay as they are.
        method: ``"hadamard"``: Hadamard matrices with random signs; ``"learned"``: learned from there.
        bits: of the weights in the step that quantizes, which learning simulates (``group_size``, ``symmetric`` and
            ``activation_bits`` likewise); None: weights as they are.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it. None: one scale per
            output channel.
        symmetric: no zero points for weights.
        activation_bits: of the layers' inputs, each token on its own grid; None: inputs as they are.
        steps: of learning.
        rate: by which a step turns the matrices at most, in radians; falls to 0.
        rows: sequences of calibration data in a step.
        seed: of the random signs.
        targets: linear layers that will be quantized, by class, name or pattern. Rotations change every layer that
            reads or writes a rotated channel.
        skip: patterns of layers that will not be quantized.
    """

    where: tuple[str, ...] = SITES
    online: bool = False
    queries_and_keys: bool = False
    method: Literal["hadamard", "learned"] = "hadamard"
    bits: int | None = option(4, low=2, high=8)
    group_size: int | None = option(None, low=1)
    symmetric: bool = True
    activation_bits: int | None = option(4, low=2, high=8)
    steps: int = option(100, low=1)
    rate: float = option(0.1, above=0.0, high=1.5)
    rows: int = option(8, low=1)
    seed: int = option(0, low=0)
    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()

    remote_code: ClassVar[RemoteCode] = _rotated_inputs.CODE

    def validate(self) -> None:
        if not self.where or set(self.where) - set(SITES):
            raise RecipeError(f"rotation: where names one or both of {', '.join(SITES)}, not {self.where!r}")
        if self.method == "learned" and self.bits is None and self.activation_bits is None:
            raise RecipeError("rotation: learned rotations need bits or activation_bits to learn from")

    def reload(self) -> Reload:
        return Reload.REMOTE_CODE if self.online or self.queries_and_keys else self.spec.reload

    def needs_data(self) -> bool:
        return self.method == "learned"

    def needs_whole_model(self) -> bool:
        return True

    def check_model(self, model: Any, label: str) -> None:
        if self.online:
            _rotated_inputs.neuron_readers(model, label)
        if self.queries_and_keys:
            _rotated_inputs.rotary_attentions(model, label)
        untied = _untied(model, self, label)
        try:
            find(model, self.where, label)
        finally:
            if untied:
                rotating.tie_head_(model)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        label, model = run.label(self), run.model
        batches: list[dict[str, Any]] = []
        if self.needs_data():
            with RecordedBatches(model) as batches:
                yield
            if not batches:
                raise ModelError(f"{label} needs calibration data to learn rotations from")
        inputs = topology.dummy_inputs(model)
        before = main_output(model, inputs)
        turned = _rotated_inputs.neuron_readers(model, label) if self.online else {}
        attentions = _rotated_inputs.rotary_attentions(model, label) if self.queries_and_keys else []
        if turned or attentions:
            _rotated_inputs.install(model, turned, attentions)
        selected = scope.select(self.targets, self.skip, experts=True)
        untied = _untied(model, self, label)
        sites = find(model, self.where, label)
        if untied and not sites.streams:
            rotating.tie_head_(model)
            untied = False
        for reason in sites.refused:
            run.warn(self, f"the residual stream is not rotated: {reason}")
        rotations = self._rotations(sites)
        for stream in sites.streams:
            rotating.fold_gains_(model, stream.norms)
        if self.method == "learned":
            rotations = self._learned(run, model, sites, rotations, selected, batches)
        _apply(model, sites, rotations)
        gap = relative_difference(main_output(model, inputs), before)
        if not gap <= rounding_tolerance(model):
            raise NumericalError(
                f"{label}: rotations change the outputs of {type(model).__name__} by {gap:.1e} of the largest; load "
                "the model again and leave where at one of residual and values"
            )
        run.cover(self, set(selected) & sites.layers(model), _skipped(sites, selected, model))
        run.report(self, streams=len(sites.streams), attentions=len(sites.heads), head_untied=untied)
        if self.online:
            run.report(self, rotated_inputs=len(turned))
            if experts := {view.parameter_name for view in topology.expert_linears(model).values()}:
                stacks = {name.rpartition(".")[0] for name in experts}
                run.warn(self, f"inputs of the stacked experts in {len(stacks)} modules are not rotated at run time")
        if self.queries_and_keys:
            run.report(self, rotated_scores=len(attentions))

    def _rotations(self, sites: Sites) -> tuple[list[Tensor], list[Tensor]]:
        """Return random Hadamard rotations: float64 ``[width, width]`` by stream, ``[heads, c, c]`` by attention."""
        generator = torch.Generator().manual_seed(self.seed)
        streams = [orthogonal.random_rotation(s.width, generator, s.keeps_mean) for s in sites.streams]
        heads = [
            torch.stack([orthogonal.random_rotation(each.width, generator) for _ in each.rows]) for each in sites.heads
        ]
        return streams, heads

    def _learned(
        self,
        run: Run,
        model: Any,
        sites: Sites,
        rotations: tuple[list[Tensor], list[Tensor]],
        selected: Mapping[str, Any],
        batches: list[dict[str, Any]],
    ) -> tuple[list[Tensor], list[Tensor]]:
        device = next(model.parameters()).device
        streams, heads = ([rotation.to(device) for rotation in part] for part in rotations)
        simulated = Simulated(selected, self.bits, self.group_size, self.symmetric, self.activation_bits)
        fit = RotationFit(model, sites.streams, sites.heads, simulated, streams, heads)
        fit.learn(sample_microbatches(batches, EVALUATED, self.rows), self.steps, self.rate)
        start, end = fit.losses[0], min(fit.losses)
        run.report(self, loss_before=float(f"{start:.6g}"), loss_after=float(f"{end:.6g}"))
        return fit.stream_rotations, fit.head_rotations

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_folded.rotation(case, self)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        parts = []
        if metrics["streams"]:
            parts.append("the residual stream" if metrics["streams"] == 1 else f"{metrics['streams']} residual streams")
        if metrics["attentions"]:
            parts.append(f"the values of {metrics['attentions']} attention layers")
        how = "Hadamard matrices with random signs"
        if "loss_before" in metrics:
            how = (
                "learned orthogonal matrices, which lowered the divergence of the quantized model's outputs on the "
                f"calibration data from {metrics['loss_before']:.4g} to {metrics['loss_after']:.4g}"
            )
        head = " The output head has its own weight now." if metrics["head_untied"] else ""
        online = ""
        if metrics.get("rotated_inputs"):
            online = (
                f" The inputs of {metrics['rotated_inputs']} linear layers behind activation functions are rotated at "
                "run time, by code in this repository."
            )
        if metrics.get("rotated_scores"):
            online += (
                f" Queries and keys of {metrics['rotated_scores']} attention layers are rotated at run time, behind "
                "the rotary embedding, so that a key/value cache holds rotated keys."
            )
        card.paragraph(
            "Rotations",
            f"Before quantization, {' and '.join(parts)} were rotated by {how}; the rotations are folded into the "
            f"weights.{head}{online}",
        )


@dataclass(frozen=True)
class Sites:
    """What can be rotated in a model: its residual streams, the values of its attentions, and reasons for the rest."""

    streams: list[StreamRotation]
    heads: list[ValueHeads]
    refused: list[str]

    def layers(self, model: Any) -> set[str]:
        """Return the names of the linear layers and matrices of experts that the rotations change."""
        names = {name for stream in self.streams for name in (*stream.readers, *stream.writers)}
        names |= {name for heads in self.heads for name in (heads.producer, heads.consumer)}
        changed = {name for stream in self.streams for name in stream.parameters}
        return names | {n for n, view in topology.expert_linears(model).items() if view.parameter_name in changed}


def find(model: Any, where: tuple[str, ...], label: str) -> Sites:
    """Return what can be rotated. Raises ``ModelError`` if nothing of ``where`` can."""
    try:
        traced = topology.trace(model)
    except (ValueError, RuntimeError) as error:
        raise ModelError(f"{label}: the wiring of the model cannot be traced: {error}") from error
    streams, refused = topology.find_stream_rotations(traced) if "residual" in where else ([], {})
    heads = topology.find_value_heads(traced) if "values" in where else []
    reasons = [f"{reason} ({name})" for name, reason in refused.items()]
    if not streams and not heads:
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise ModelError(f"{label}: nothing of {type(model).__name__} can be rotated in {', '.join(where)}{why}")
    return Sites(streams, heads, reasons)


def _untied(model: Any, step: Rotation, label: str) -> bool:
    if "residual" not in step.where:
        return False
    try:
        return rotating.untie_head_(model)
    except ModelError as error:
        raise ModelError(f"{label}: {error}") from error


def _apply(model: Any, sites: Sites, rotations: tuple[list[Tensor], list[Tensor]]) -> None:
    for stream, rotation in zip(sites.streams, rotations[0], strict=True):
        rotating.rotate_stream_(model, stream, rotation)
    for heads, each in zip(sites.heads, rotations[1], strict=True):
        rotating.rotate_values_(model, heads, each)


def _skipped(sites: Sites, selected: Mapping[str, Any], model: Any) -> dict[str, set[str]]:
    rest = set(selected) - sites.layers(model)
    reason = sites.refused[0] if sites.refused else "it neither reads nor writes rotated channels"
    return {reason: rest} if rest else {}


@hookimpl
def register_techniques(register: Any) -> None:
    register(Rotation)
