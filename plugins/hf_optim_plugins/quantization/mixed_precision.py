r"""Mixed precision for activations: 8 bits where that does no harm, 16 where it does, found by measuring.

With one grid per tensor, a few activation tensors, those with outliers, cause nearly the whole loss of 8-bit
quantization. With ``D(S)`` the divergence of the model's output when the inputs in the set ``S`` are rounded to 8 bits
(static, asymmetric, ranges from calibration), each input ``i`` is rounded alone, and then 16 bits are given in the
order of the divergences::

    D({i_1}) >= D({i_2}) >= ... >= D({i_n}),        k* = min { k : D(all but i_1 .. i_k) <= tolerance }

Table 2 of the paper measures the inputs the other way round: all are rounded but one. ``k*`` is found by bisection, so
it is the minimum only if ``D`` does not rise when another input gets 16 bits; otherwise it is a ``k`` within the
tolerance, but not always the smallest.

``D`` is the Kullback-Leibler divergence of the softmax of the logits, in nats per position; for a model without logits
it is the relative squared error of its first output.

Bondarenko, Nagel, Blankevoort, "Understanding and Overcoming the Challenges of Efficient Transformer Quantization",
arXiv 2109.12948, sections 3 and 4. The paper simulates 16-bit integers; here an input with 16 bits stays in floating
point (such a layer is W8A16), which is at least as fine in float16 and float32. The paper finds BERT's residual sums to
be the worst tensors, and gives these 16 bits. They are inputs of norms, which no stock checkpoint can round, so they
take part only with ``sites: all``, and the model then brings its own code; by default they all stay in floating point,
and only the inputs of linears compete.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hf_optim import (
    Contract,
    ModelError,
    Paper,
    RecipeError,
    Reload,
    Run,
    Scope,
    Technique,
    compressed,
    hookimpl,
    option,
    technique,
)
from hf_optim.checkpoints.remote_code import RemoteCode
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import (
    ASYMMETRIC_INT8,
    GridSpec,
    activation_rounding,
    make_grid,
    qparams_from_range,
    quantize_dequantize,
)
from hf_optim.toolkit.statistics import TensorMinMax
from hf_optim.toolkit.topology import find_residual_stream, not_reached

from . import _recompute_activations
from ._activation_code import Grids, code_of, install, select_unshared
from ._weights import QUANTIZES, require_storable

if TYPE_CHECKING:
    from hf_optim import Card

EVERY = "all inputs"
Scales = dict[str, tuple[Tensor, Tensor]]


@technique(
    "mixed_precision",
    family="quantization",
    paper=Paper(
        "2109.12948", "Understanding and Overcoming the Challenges of Efficient Transformer Quantization", 2021
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
)
class MixedPrecision(Technique):
    """Quantize weights and activations to 8 bits, but leave the most sensitive activations in 16 bits.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern.
        skip: patterns of layers to leave out.
        tolerance: the divergence of the output that rounding activations may cause, in nats per position (see above).
        budget: at most this share of the tensors gets 16 bits, whatever the divergence; None for no limit.
        sites: which tensors take part: the inputs of ``"linears"``, or ``"all"``: residual sums too.
        bits: of a weight, symmetric with one scale per output channel; None leaves weights unquantized.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    tolerance: float = option(0.005, low=0.0)
    budget: float | None = option(None, low=0.0, high=1.0)
    sites: Literal["linears", "all"] = "linears"
    bits: int | None = option(8, low=2, high=8)

    remote_code: ClassVar[RemoteCode] = code_of("mixed_precision")

    def validate(self) -> None:
        if self.bits is None and self.tolerance == 0 and self.sites == "linears":
            raise RecipeError("mixed_precision: bits: null with tolerance: 0 quantizes nothing; give one of the two")

    def reload(self) -> Reload:
        return Reload.STOCK_FORMAT if self.sites == "linears" else Reload.REMOTE_CODE

    def contract(self) -> Contract:
        # The modules of the remote code hold codes, to which masks cannot be applied.
        plain = self.spec.contract
        kept = plain.keeps if self.sites == "linears" else frozenset()
        return Contract(needs=plain.needs, adds=plain.adds, drops=plain.drops, keeps=kept)

    def needs_whole_model(self) -> bool:
        return True

    def check_model(self, model: Any, label: str) -> None:
        if self.sites != "all":
            require_storable(self, model, label, integer=self.bits is not None)

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        layers, skipped = self._layers(run, scope)
        require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(self))
        norms = self._norms(scope.model)
        with TensorMinMax({**layers, **norms}, run.label(self)) as ranges:
            yield
        skipped |= not_reached((*layers, *norms), ranges)
        modules = {name: m for name, m in {**layers, **norms}.items() if name in ranges}
        scales = {name: grid_of(*ranges[name], module) for name, module in modules.items()}
        sites = activation_rounding.group_by_input(topology.trace(scope.model), modules)
        roundings = {name: [(modules[m], rounding(scales[m])) for m in members] for name, members in sites.items()}
        cases = {name: dict(pairs) for name, pairs in roundings.items()}
        every = {module: how for pairs in roundings.values() for module, how in pairs}
        with activation_rounding.RoundingSensitivity(scope.model, {**cases, EVERY: every}) as alone:
            yield
        reached = {0: alone.pop(EVERY)}
        ranking = sorted(alone, key=lambda name: -alone[name])
        most = len(ranking) if self.budget is None else math.floor(self.budget * len(ranking))
        low, high = (0, 0) if reached[0] <= self.tolerance or not most else (1, most)
        while low not in reached:  # bisection: the divergence falls with the number of tensors in 16 bits
            middle = (low + high) // 2
            rest = {module: how for name in ranking[middle:] for module, how in roundings[name]}
            with activation_rounding.RoundingSensitivity(scope.model, {"rest": rest}) as found:
                yield
            reached[middle] = found["rest"]
            low, high = (low, middle) if found["rest"] <= self.tolerance else (min(middle + 1, high), high)
        chosen = ranking[:low]
        wide = {member for name in chosen for member in sites[name]}
        self._store(scope, layers, norms, {name: s for name, s in scales.items() if name not in wide})
        run.cover(self, [name for name in layers if name in ranges], skipped)
        run.report(
            self,
            sites=len(ranking),
            sites_with_16_bits=len(chosen),
            divergence=float(f"{reached[low]:.6g}"),
            divergence_all_8_bits=float(f"{reached[0]:.6g}"),
            ranking={name: float(f"{alone[name]:.6g}") for name in ranking},
            with_16_bits=chosen,
            read_by={name: list(sites[name]) for name in ranking},
        )

    def _layers(self, run: Run, scope: Scope) -> tuple[dict[str, Any], dict[str, list[str]]]:
        if self.sites == "all":
            return select_unshared(scope.model, scope.select(self.targets, self.skip))
        integer = self.bits is not None
        layers, skipped = compressed.storable(scope, self.targets, self.skip, integer=integer, label=run.label(self))
        return dict(layers), skipped

    def _norms(self, model: Any) -> dict[str, nn.Module]:
        if self.sites == "linears":
            return {}
        try:
            return {name: model.get_submodule(name) for name in find_residual_stream(model).norms}
        except ModelError:
            return {}

    def _store(self, scope: Scope, layers: Mapping[str, Any], norms: Mapping[str, nn.Module], scales: Scales) -> None:
        """Quantize the weights, and the inputs that have ``scales``."""
        if self.sites == "all":
            grids = {
                name: Grids(scale, zero, torch.zeros(width_of(scope.model.get_submodule(name)), dtype=torch.int64))
                for name, (scale, zero) in scales.items()
            }
            install(scope.model, self.remote_code, layers, [n for n in norms if n in grids], grids, self.bits)
            return
        for name, layer in layers.items():
            grid = None if self.bits is None else make_grid(layer.weight.detach(), GridSpec(self.bits))
            inputs = scales.get(name, (None, None))
            if grid is None and name not in scales:
                continue
            spec = grid.spec if grid else None
            scheme = compressed.scheme_of(
                spec, "int8" if name in scales else None, static=True, symmetric_activations=False
            )
            codes = grid.quantize(layer.weight.detach()) if grid else None
            compressed.store(layer, scheme, codes, grid.scale if grid else None, None, *inputs)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        if self.sites == "linears":
            compressed.attach_quantizer(run.model)

    def recompute(self, case: Any) -> dict[str, Any]:
        return _recompute_activations.mixed_precision(case, self.sites)

    @hookimpl
    def export(self, run: Run, directory: Path, card: Card) -> None:
        metrics = run.reported(self)
        if not metrics:
            return
        wide = metrics["with_16_bits"]
        card.paragraph(
            "Activations in 16 bits",
            f"{len(wide)} of {metrics['sites']} activation tensors keep 16 bits (they stay in floating point); the "
            "others are rounded to 8-bit grids made on calibration data. The table has the divergence of the output "
            "when that tensor alone is rounded: nats per position if the model has logits, else relative squared "
            "error.",
        )
        rows = [
            [", ".join(metrics["read_by"][name]), f"{shift:.2e}", 16 if name in wide else 8]
            for name, shift in sorted(metrics["ranking"].items(), key=lambda item: -item[1])
        ]
        card.table("Sensitivity of each activation tensor to 8 bits", ["read by", "divergence", "bits"], rows)


def grid_of(low: Tensor, high: Tensor, module: nn.Module) -> tuple[Tensor, Tensor]:
    """Return scale and zero point of the asymmetric 8-bit grid of one input, ``[1]`` each."""
    scale, zero = qparams_from_range(low, high, ASYMMETRIC_INT8, module.get_parameter("weight").dtype)
    assert zero is not None
    return scale, zero


def rounding(grid: tuple[Tensor, Tensor]) -> activation_rounding.Rounding:
    """Return the function that rounds a tensor to the grid."""
    return lambda x: quantize_dequantize(x, *grid)


def width_of(module: nn.Module) -> int:
    """Return the number of channels of a linear's or a norm's input."""
    return topology.features(module)[1] if topology.is_linear(module) else module.get_parameter("weight").numel()


@hookimpl
def register_techniques(register):
    register(MixedPrecision)
