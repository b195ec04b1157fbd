r"""Q-BERT: 2, 4 or 8 bits for each layer by the curvature of the loss, and a separate range for each group of rows.

For every layer ``i`` power iteration with exact Hessian-vector products (1905.03696;
``hf_optim.toolkit.statistics.curvature``) gives the top eigenvalue ``λ_i`` of the loss's Hessian in its weight, on
several parts of the data. Layers are ranked by (1909.05840, mixed precision quantization)::

    Ω_i = |mean(λ_i)| + std(λ_i)

and a layer of low ``Ω`` gets few bits. ``assign`` decides how many bits each layer gets within a number of bytes:

``"rank"``: the paper's, by the order of ``Ω`` alone.

``"sensitivity"``: the least sum of ``Ω_i ‖W_i - Q_b(W_i)‖²``, exactly
(``hf_optim.toolkit.quantization.bit_budget``); with traces in place of eigenvalues it is HAWQ-V2's (1911.03852).

``"quadratic"``: the least sum of ``½ |ΔᵀH_iΔ|`` with ``Δ = Q_b(W_i) - W_i``, the loss's own second-order change along
the rounding error, by one Hessian-vector product. ``Ω ‖Δ‖² / 2`` is its upper bound, reached only by an error along the
top eigenvector; rounding errors have other directions, and layers differ in how loose the bound is.

On babyllama-1m (rounded in groups of 32 inputs, nothing trained) ``"quadratic"`` did best of the three at 4 and at 3
bits on average, and is the default. At 4 bits it is better than 4 bits everywhere. At 3 bits a mix of 2, 4 and 8 is
worse than 3 bits everywhere, whatever assigns them: 2 bits cost more than 4 bits win back. With 3 among the ``choices``
mixed bits win there too, but only with curvature from enough data: on a single sequence of 256 tokens they lose.

The loss is the model's own: cross-entropy with the inputs as labels for a causal language model, or with the labels of
the batch. Without labels it is ``KL(p₀ ‖ p)`` of the model's own predictions, or ``½ ‖f - f₀‖²`` of its outputs (a bare
encoder), whose Hessian is the Gauss-Newton matrix ``JᵀJ``.

Groups are the paper's: a matrix is cut into ``groups`` parts of neighbouring output rows (heads, and parts of heads),
each with its own range; they are stored as scales per channel, equal within a group. ``group_size`` cuts along the
inputs.

Differences from the paper: it fine-tunes the quantized model, while this technique rounds after training, where 2 bits
hurt more; let a later step train or compensate with the bits assigned here (``assign_only``). The paper quantizes
embeddings to 8 bits; compressed-tensors as transformers reads it stores linear layers only, so embeddings are left
unquantized. It rounds activations to 8 bits in all its experiments, here only with ``activations``. Its ranges are the
minimum and maximum of a group, here a search for the least squared error by default (``observer``). Its grids are
asymmetric, whose codes would take a byte each on disk: the default here is symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_optim import (
    Contract,
    ModelError,
    NumericalError,
    Paper,
    RecipeError,
    Reload,
    Technique,
    compressed,
    hookimpl,
    option,
    technique,
    traits,
)
from hf_optim.toolkit.distributed import collectives
from hf_optim.toolkit.quantization import (
    Grid,
    bit_budget,
    fit_group_size,
    make_grid,
)
from hf_optim.toolkit.statistics import (
    RecordedBatches,
    calibration_loss,
    enable_double_backward,
    gradients,
    hessian_product,
    power_iteration,
    random_direction,
    sample_microbatches,
)
from hf_optim.toolkit.topology import group_by_block

from . import _recompute_bits
from ._weights import QUANTIZES, require_storable, select_layers, weight_spec

if TYPE_CHECKING:
    from hf_optim import Card, Run, Scope


@technique(
    "qbert",
    family="quantization",
    paper=Paper("1909.05840", "Q-BERT: Hessian Based Ultra Low Precision Quantization of BERT", 2019),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class QBERT(Technique):
    """Choose 2, 4 or 8 bits for each layer by the curvature of the loss, within a budget, and quantize the weights.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out; they are not part of the budget either.
        choices: the numbers of bits to choose from, each 2 to 8.
        budget: mean bits per weight. The bytes of all codes and scales together are at most those of a model with this
            many bits everywhere.
        assign: ``"quadratic"``, ``"sensitivity"`` or ``"rank"``, see above.
        assign_only: only assign the bits; a later step must quantize, and uses them.
        groups: parts of neighbouring output rows with their own range (128 in the paper); the largest divisor of the
            layer's height up to it is used. 1 is one range for the whole matrix. None: one per output channel.
        group_size: inputs that share a range; the largest divisor of the layer's width up to it is used.
        symmetric: no zero points. Asymmetric codes are stored one to a byte, whatever their bits.
        observer: ranges from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``).
        activations: quantize the inputs of the layers to ``"int8"``, per token.
        shards: parts of the calibration data on which curvature is measured, evenly spaced over it.
        rows: samples in a part; with their length they determine the memory needed.
        iterations: most Hessian-vector products per layer and part.
        tolerance: relative change of an eigenvalue at which to stop.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    choices: tuple[int, ...] = (2, 4, 8)
    budget: float = option(4.0, low=2.0, high=8.0)
    assign: Literal["quadratic", "sensitivity", "rank"] = "quadratic"
    assign_only: bool = False
    groups: int | None = option(128, low=1)
    group_size: int | None = option(None, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "mse"
    activations: Literal["int8"] | None = None
    shards: int = option(4, low=1)
    rows: int = option(2, low=1)
    iterations: int = option(30, low=2)
    tolerance: float = option(0.02, above=0.0, below=1.0)

    @classmethod
    def for_testing(cls) -> Technique:
        return cls.from_dict({"iterations": 5})

    def validate(self) -> None:
        if not self.choices or any(not 2 <= bits <= 8 for bits in self.choices):
            raise RecipeError(f"qbert: choices are numbers of bits from 2 to 8, not {self.choices!r}")
        if len(set(self.choices)) < len(self.choices):
            raise RecipeError(f"qbert: choices has a number of bits twice: {self.choices!r}")
        if self.budget < min(self.choices):
            raise RecipeError(f"qbert: budget {self.budget} is under the smallest of choices, {min(self.choices)}")
        if self.assign_only and self.activations:
            raise RecipeError("qbert: assign_only quantizes nothing; give activations to the step that quantizes")

    def contract(self) -> Contract:
        if not self.assign_only:
            return self.spec.contract
        return Contract(
            needs={traits.FLOAT_WEIGHTS},
            adds={traits.BITS_ASSIGNED},
            keeps={traits.SPARSE, traits.SPARSE_NM},
            owes={traits.QUANTIZED},
        )

    def needs_whole_model(self) -> bool:
        return True

    def check_model(self, model: Any, label: str) -> None:
        require_storable(self, model, label)

    def code_bits(self) -> float:
        """Return the budget: the bytes of codes and scales are at most those of so many bits everywhere."""
        return self.budget

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = select_layers(self, run, scope)
        with RecordedBatches(scope.model) as batches:
            yield
        if not batches:
            raise ModelError(f"{run.label(self)} needs calibration data to measure curvature on")
        parts = sample_microbatches(batches, self.shards, self.rows)
        found: dict[str, torch.Tensor] = {}
        for block in group_by_block(scope.model, layers):
            found |= self._measure(run, scope.model, block, parts)
        collectives.all_reduce_dict_(found, layers, "sum")
        if unused := [name for name in layers if name not in found]:
            skipped["the loss does not depend on it"] = unused
        table = {name: self._metrics(layers[name], sums) for name, sums in found.items()}
        if table:
            self._assign(run, {name: layers[name] for name in table}, table)
        run.cover(self, table, skipped)

    # -- curvature ------------------------------------------------------------------------------------------------
    def _measure(
        self, run: Run, model: nn.Module, layers: Mapping[str, nn.Linear], parts: list[dict[str, Any]]
    ) -> dict[str, torch.Tensor]:
        """Return the sums over the parts for each layer: 1, ``λ``, ``λ²``, and ``½ ΔᵀHΔ`` for each of the ``choices``.

        float64 ``[3 + choices]``.
        """
        weights = {name: layer.weight for name, layer in layers.items()}
        sums: dict[str, torch.Tensor] = {}
        start = {name: random_direction(weight) for name, weight in weights.items()}
        with enable_double_backward(model, weights.values()):
            for part in parts:
                loss = calibration_loss(model, part)
                for name, gradient in gradients(loss, weights).items():
                    terms, start[name] = self._curvature(run, name, gradient, layers[name], start[name])
                    sums[name] = sums.get(name, 0.0) + terms  # type: ignore[operator]
                del loss
        return sums

    def _curvature(
        self, run: Run, name: str, gradient: torch.Tensor, layer: nn.Linear, start: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the terms of one part, and the top eigenvector, which is nearly that of the next part."""
        weight = layer.weight

        def product(vector: torch.Tensor) -> torch.Tensor:
            return hessian_product(gradient, weight, vector)

        top = power_iteration(product, start, self.iterations, self.tolerance)
        if not torch.isfinite(torch.tensor(top.value)) or not torch.isfinite(top.vector).all():
            raise NumericalError(
                f"{run.label(self)}: the curvature of the loss in {name} is not finite on the calibration data; check "
                "that the model computes finite outputs in this dtype (float16: load it in bfloat16 or float32)"
            )
        halves = []
        for bits in sorted(self.choices) if self.assign == "quadratic" else ():
            with torch.no_grad():
                change = self._grid(layer, bits).nearest(weight).to(weight) - weight
            halves.append(0.5 * float((change * product(change)).sum()))
        return torch.tensor([1.0, top.value, top.value**2, *halves], dtype=torch.float64), top.vector

    def _metrics(self, layer: nn.Linear, sums: torch.Tensor) -> dict[str, Any]:
        """Return mean and standard deviation of ``λ``, ``Ω``, and the cost of each number of bits, as JSON types."""
        count = float(sums[0])
        mean = float(sums[1]) / count
        std = max(float(sums[2]) / count - mean**2, 0.0) ** 0.5
        omega = abs(mean) + std
        costs = {}
        for place, bits in enumerate(sorted(self.choices)):
            if self.assign == "quadratic":
                costs[bits] = abs(float(sums[3 + place])) / count
            else:
                weight = layer.weight.detach()
                error = (self._grid(layer, bits).nearest(weight).to(weight) - weight).double().square().sum()
                costs[bits] = omega * float(error)
        return {"mean": mean, "std": std, "omega": omega, "costs": costs}

    # -- bits -----------------------------------------------------------------------------------------------------
    def _assign(self, run: Run, layers: Mapping[str, nn.Linear], table: Mapping[str, dict[str, Any]]) -> None:
        sizes = {name: {bits: self._bytes(layer, bits) for bits in self.choices} for name, layer in layers.items()}
        limit = sum(self._bytes(layer, self.budget) for layer in layers.values())
        if self.assign == "rank":
            plan = bit_budget.allocate_bits_by_rank(
                {name: row["omega"] for name, row in table.items()}, self.choices, sizes, limit
            )
        else:
            plan = bit_budget.allocate_bits({name: row["costs"] for name, row in table.items()}, sizes, limit)
        weights = {name: layer.weight.numel() for name, layer in layers.items()}
        run.report(
            self,
            layers={
                name: {**{key: float(f"{row[key]:.6g}") for key in ("mean", "std", "omega")}, "bits": plan[name]}
                for name, row in table.items()
            },
            bytes=sum(sizes[name][bits] for name, bits in plan.items()),
            bytes_allowed=limit,
            mean_bits=round(sum(weights[name] * bits for name, bits in plan.items()) / sum(weights.values()), 4),
        )
        if self.assign_only:
            run.bit_plan |= plan
            return
        for name, layer in layers.items():
            grid = self._grid(layer, plan[name])
            codes = grid.quantize(layer.weight.detach())
            compressed.store(
                layer, compressed.scheme_of(grid.spec, self.activations), codes, grid.scale, grid.zero_point
            )

    def _bytes(self, layer: nn.Linear, bits: float) -> int:
        rows, columns = layer.weight.shape
        scales = columns // fit_group_size(columns, self.group_size) if self.group_size else 1
        return bit_budget.stored_bytes(rows, columns, bits, scales, layer.weight.element_size())

    def _grid(self, layer: nn.Linear, bits: int) -> Grid:
        return grouped_grid(
            layer.weight.detach(), bits, self.groups, self.group_size, symmetric=self.symmetric, observer=self.observer
        )

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        if not self.assign_only:
            compressed.attach_quantizer(run.model)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_bits.qbert(case, self)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        table = metrics.get("layers")
        if not table:
            return
        card.paragraph(
            "Q-BERT: bits by curvature",
            f"{len(table)} linear layers have {metrics['mean_bits']:g} bits per weight on average "
            f"({metrics['bytes']:,} bytes of codes and scales, {metrics['bytes_allowed']:,} allowed), assigned by "
            f"`{self.assign}`. λ is the top eigenvalue of the loss's Hessian in the layer's weight, "
            "Ω = |mean(λ)| + std(λ) over parts of the calibration data.",
        )
        card.table(
            "Q-BERT: eigenvalues and bits",
            ["layer", "mean λ", "std λ", "Ω", "bits"],
            [
                [f"`{name}`", f"{row['mean']:.3g}", f"{row['std']:.3g}", f"{row['omega']:.3g}", str(row["bits"])]
                for name, row in table.items()
            ],
        )


def grouped_grid(
    weight: torch.Tensor,
    bits: int,
    groups: int | None,
    group_size: int | None = None,
    *,
    symmetric: bool = True,
    observer: Literal["minmax", "mse"] = "minmax",
) -> Grid:
    """Return a grid whose scales are shared by groups of output rows, with one (repeated) scale for each row.

    Args:
        weight: ``[out, in]``.
        bits: of a code.
        groups: parts of neighbouring rows that share a scale (the largest divisor of ``out`` up to it); None: ``out``.
        group_size: inputs that share a scale (the largest divisor of ``in`` up to it); None for all.
        symmetric, observer: see ``make_grid``.

    Returns:
        Scales ``[out, 1]``, or ``[out, in / group_size]``, equal in the rows of a group.
    """
    rows, columns = weight.shape
    parts = fit_group_size(rows, groups) if groups else rows
    height = rows // parts
    size = fit_group_size(columns, group_size) if group_size else columns
    # One row per group, in which the weights that share a scale are neighbours.
    merged = weight.reshape(parts, height, columns // size, size).transpose(1, 2).reshape(parts, -1)
    shared = height * size if group_size else None
    found = make_grid(merged, weight_spec(merged.shape[1], bits, shared, symmetric), observer)
    spec = weight_spec(columns, bits, group_size, symmetric)
    zero = None if found.zero_point is None else found.zero_point.repeat_interleave(height, 0)
    return Grid(spec, found.scale.repeat_interleave(height, 0), zero)


@hookimpl
def register_techniques(register):
    register(QBERT)
