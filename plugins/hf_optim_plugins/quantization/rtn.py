r"""Round to nearest: every weight, and optionally every input, is rounded to the nearest point of a uniform grid.

With a range ``[l, h]`` of the values that share a scale, ``b`` bits and codes from ``-2^(b-1)`` to ``2^(b-1) - 1``
(1712.05877, equation 1, in the signed form)::

    symmetric    scale = max(-l, h) / ((2^b - 1) / 2)      z = 0
    asymmetric   scale = (h - l) / (2^b - 1)               z = round(-2^(b-1) - l / scale),  l <= 0 <= h
    code         q = clamp(round(w / scale) + z)           value (q - z) * scale

so that ``|value - w| <= scale / 2`` and zero is always on the grid. FP8 takes float8 (e4m3) codes, ``scale = max|w| /
448``. NVFP4 and MXFP4 take 4-bit floats (e2m1) with an e4m3 scale for 16 inputs, or a power of two for 32
(``hf_optim.toolkit.quantization.float4``). A scale is shared by the tensor, an output channel or a group of inputs; for
activations by a token, computed on the fly, or by the tensor, from calibration data.

Names used elsewhere: W8A32 is ``bits: 8`` alone; W8A8 adds ``activations: int8``; W32A8 is ``bits: null, activations:
int8``; W4A16 and W3A16 are ``bits: 4`` (``3``) with a ``group_size``.

In a mixture of experts every matrix of every expert is a separate layer. Experts get integer weights without zero
points, or are left unquantized (fp8); their inputs are never quantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from hf_optim import Paper, RecipeError, Reload, Technique, compressed, hookimpl, option, technique
from hf_optim.toolkit.quantization import Grid, GridSpec, make_grid, qparams_from_range
from hf_optim.toolkit.statistics import TensorMinMax
from hf_optim.toolkit.topology import ExpertLinear, not_reached

from ._weights import FLOAT4_GROUPS, QUANTIZES, require_float4_fields, select_layers, weight_spec

if TYPE_CHECKING:
    from compressed_tensors.quantization import QuantizationScheme

    from hf_optim import Run, Scope

# Scale and zero point of statically quantized inputs.
Inputs = tuple["torch.Tensor | None", "torch.Tensor | None"]


@technique(
    "rtn",
    family="quantization",
    paper=Paper(
        "1712.05877",
        "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        2018,
    ),
    contract=QUANTIZES,
    reload=Reload.STOCK_FORMAT,
    parallel={"calibration": "yes", "tensor": "yes", "expert": "yes"},
)
class RTN(Technique):
    """Round weights, and optionally activations, to the nearest point of a uniform grid.

    Attributes:
        targets: linear layers to quantize, by class, name or pattern, and embeddings whose names a pattern gives; of
            these the weights alone are quantized, to integers of a byte each.
        skip: patterns of layers to leave out.
        bits: of a weight, 2 to 8; None leaves the weights unquantized (W32A8). Bits that an earlier step has assigned
            to a layer take precedence.
        format: ``"int"``; ``"fp8"``: float8 (e4m3) weights, with ``bits: 8``; ``"nvfp4"`` or ``"mxfp4"``: 4-bit floats
            in groups of 16 or 32, with ``bits: 4``, of models in bfloat16.
        strategy: which weights share a scale: ``"tensor"``, ``"channel"`` (an output channel) or ``"group"`` (of
            inputs). None: ``group`` if a ``group_size`` is given, else ``channel``.
        group_size: inputs that share a scale; the largest divisor of the layer's width up to it is used.
        symmetric: no zero points for weights. Asymmetric codes are stored one to a byte (see
            ``hf_optim.compressed.scheme``).
        observer: scales from ``"minmax"`` of the weights, or from a search for the least squared error (``"mse"``).
        activations: quantize the inputs of the layers to ``"int8"``, ``"fp8"`` or ``"int4"``.
        dynamic: compute the scale of the inputs on the fly, per token. False: one scale per layer from calibration
            data.
        symmetric_activations: no zero point for the inputs' grid.
    """

    targets: tuple[str, ...] = ("Linear",)
    skip: tuple[str, ...] = ()
    bits: int | None = option(8, low=2, high=8)
    format: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int"
    strategy: Literal["tensor", "channel", "group"] | None = None
    group_size: int | None = option(None, low=1)
    symmetric: bool = True
    observer: Literal["minmax", "mse"] = "minmax"
    activations: Literal["int8", "fp8", "int4"] | None = None
    dynamic: bool = True
    symmetric_activations: bool = True

    def validate(self) -> None:
        if self.bits is None and self.activations is None:
            raise RecipeError("rtn: bits: null quantizes nothing without activations: int8, int4 or fp8")
        if self.format == "fp8" and (self.bits != 8 or not self.symmetric):
            raise RecipeError(
                "rtn: format fp8 has 8 bits and no zero point; leave bits and symmetric at their defaults"
            )
        if self.format in FLOAT4_GROUPS and self.strategy in ("tensor", "channel"):
            raise RecipeError(f"rtn: format {self.format} has groups; leave strategy out")
        require_float4_fields(self, "rtn", (None,))
        if self.strategy == "group" and self.group_size is None:
            raise RecipeError("rtn: strategy group needs a group_size, such as 128")
        if self.group_size is not None and self.strategy in ("tensor", "channel"):
            raise RecipeError(f"rtn: group_size and strategy {self.strategy} exclude each other")
        if self.format == "fp8" and self.group_size is not None:
            raise RecipeError("rtn: format fp8 has scales per tensor or channel; leave group_size out")
        if self.activations == "fp8" and not self.symmetric_activations:
            raise RecipeError("rtn: fp8 activations have no zero point; leave symmetric_activations at true")

    def takes(self, module: Any) -> bool:
        return isinstance(module, nn.Embedding) or super().takes(module)

    def needs_data(self) -> bool:
        return self.activations is not None and not self.dynamic

    @hookimpl
    def calibrate(self, run: Run, scope: Scope) -> Iterator[None]:
        integer = self.format == "int" and self.bits is not None
        layers, skipped = select_layers(
            self, run, scope, integer=integer, experts=True, symmetric=self.symmetric, embeddings=True
        )
        ranges: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        if self.needs_data():
            observed = {name: layer for name, layer in layers.items() if isinstance(layer, nn.Linear)}
            with TensorMinMax(observed, run.label(self)) as ranges:
                yield
            skipped |= not_reached(observed, ranges)
            layers = {name: layer for name, layer in layers.items() if name in ranges or name not in observed}
        for name, layer in layers.items():
            grid = self._grid(layer, self._bits(run, name))
            inputs = self._input_grid(layer, *ranges[name]) if name in ranges else (None, None)
            quantize(layer, grid, self._scheme(layer, grid), inputs)
        if self.activations and any(isinstance(layer, ExpertLinear) for layer in layers.values()):
            run.record.note("The inputs of experts are not quantized: stock transformers runs experts on plain inputs.")
        run.cover(self, layers, skipped)

    def _bits(self, run: Run, name: str) -> int | None:
        """Return the bits of a layer's weight: those an earlier step assigned, unless it is float or not quantized."""
        return run.bits_of(name, self.bits) if self.bits and self.format == "int" else self.bits

    def _spec(self, in_features: int, bits: int) -> GridSpec:
        return weight_spec(
            in_features, bits, self.group_size, self.symmetric, strategy=self.strategy, format=self.format
        )

    def _grid(self, layer: nn.Linear | ExpertLinear, bits: int | None) -> Grid | None:
        weight = layer.weight.detach()
        return make_grid(weight, self._spec(weight.shape[1], bits), self.observer) if bits else None

    def _scheme(self, layer: nn.Linear | ExpertLinear, grid: Grid | None) -> QuantizationScheme:
        if not isinstance(layer, nn.Linear):
            return compressed.scheme_of(grid.spec if grid else None)
        static, symmetric = not self.dynamic, self.symmetric_activations
        return compressed.scheme_of(grid.spec if grid else None, self.activations, static, symmetric)

    def _input_grid(
        self, layer: nn.Linear, low: torch.Tensor, high: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        kind: Literal["int", "float"] = "float" if self.activations == "fp8" else "int"
        spec = GridSpec(4 if self.activations == "int4" else 8, kind, "tensor", None, self.symmetric_activations)
        return qparams_from_range(low, high, spec, layer.weight.dtype)

    @hookimpl
    def finalize_model(self, run: Run) -> None:
        compressed.attach_quantizer(run.model)


def quantize(
    layer: nn.Linear | ExpertLinear,
    grid: Grid | None,
    scheme: QuantizationScheme,
    inputs: Inputs = (None, None),
) -> None:
    """Round a layer's weight to ``grid`` and store it; ``inputs`` is the scale and zero point of static activations."""
    if grid is None:
        compressed.store(layer, scheme, input_scale=inputs[0], input_zero_point=inputs[1])
    else:
        codes = grid.quantize(layer.weight.detach())
        compressed.store(layer, scheme, codes, grid.scale, grid.zero_point, *inputs, global_scale=grid.global_scale)


@hookimpl
def register_techniques(register):
    register(RTN)
