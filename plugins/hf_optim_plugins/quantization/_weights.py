"""Shared by the techniques that quantize weights: the contract, the layers, the grid, and the errors they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch

from hf_optim import Contract, ModelError, RecipeError, Scope, compressed, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import GridSpec, fit_group_size

if TYPE_CHECKING:
    from hf_optim import Card, Run

# The columns that share a scale in the formats of 4-bit floats.
FLOAT4_GROUPS = {"nvfp4": 16, "mxfp4": 32}
# Floating-point weights become quantized ones; zeros stay zero.
QUANTIZES = Contract(
    needs={traits.FLOAT_WEIGHTS},
    adds={traits.QUANTIZED},
    drops={traits.FLOAT_WEIGHTS},
    keeps={traits.SPARSE, traits.SPARSE_NM},
)


def select_layers(step: Any, run: Run, scope: Scope, **options: Any) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Return the layers of a scope to quantize, and the names of those left out, by reason.

    Args:
        step: has the fields ``targets`` and ``skip``.
        run, scope: where it works.
        options: see ``hf_optim.compressed.storable``.

    Raises:
        NumericalError: for weights that are infinite or NaN.
        ModelError: for experts that could not be stored (see ``storable``).
    """
    format = getattr(step, "format", "int")
    if format in FLOAT4_GROUPS:
        options = {**options, "integer": False}
    layers, skipped = compressed.storable(scope, step.targets, step.skip, label=run.label(step), **options)
    layers = _fitting(layers, format, skipped, run.label(step)) if format in FLOAT4_GROUPS else layers
    require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(step))
    return layers, skipped


def _fitting(layers: dict[str, Any], format: str, skipped: dict[str, list[str]], label: str) -> dict[str, Any]:
    """Return the layers that 4-bit floats can be stored of; add the names of the others to ``skipped``."""
    size = FLOAT4_GROUPS[format]
    other = next((name for name, layer in layers.items() if layer.weight.dtype != torch.bfloat16), None)
    if other is not None:
        raise ModelError(
            f"{label}: {other} is in {layers[other].weight.dtype}, and stock transformers decodes {format} to bfloat16 "
            "only: load the model in bfloat16 (dtype=torch.bfloat16; --dtype bfloat16)"
        )
    for name in [name for name, layer in layers.items() if layer.weight.shape[1] % size]:
        width = layers.pop(name).weight.shape[1]
        skipped.setdefault(f"its {width} inputs are not a multiple of the {size} that share a scale", []).append(name)
    return layers


def require_float4_fields(step: Any, name: str, sizes: tuple[int | None, ...]) -> None:
    """Raise ``RecipeError`` if the fields of a step contradict the 4-bit floats of its ``format``.

    Args:
        step: has ``format``, ``bits``, ``group_size``, ``symmetric`` and ``activations``.
        name: of the technique.
        sizes: group sizes that the step may have beside the format's own: its default, which says nothing.
    """
    if step.format not in FLOAT4_GROUPS:
        return
    size = FLOAT4_GROUPS[step.format]
    if step.bits != 4 or not step.symmetric or step.activations is not None:
        raise RecipeError(
            f"{name}: format {step.format} has 4 bits, no zero points, and inputs as they are: set bits: 4, and leave "
            "symmetric and activations at their defaults"
        )
    if step.group_size not in (size, *sizes):
        raise RecipeError(f"{name}: format {step.format} has groups of {size}; leave group_size out")


def require_signs(step: Any, name: str) -> None:
    """Raise ``RecipeError`` for ``signed_scales`` of a grid that has none: with zero points, or of 4-bit floats."""
    if step.signed_scales and not (step.symmetric and step.format == "int"):
        raise RecipeError(
            f"{name}: signed_scales are those of integers without zero points: leave signed_scales out, or set "
            "symmetric: true and format: int"
        )


def bits_of(step: Any, run: Run, name: str) -> int:
    """Return the bits of a layer's weight: those an earlier step assigned, unless the ``format`` has its own."""
    return step.bits if getattr(step, "format", "int") != "int" else run.bits_of(name, step.bits)


def cover_outside_blocks(step: Any, run: Run) -> None:
    """Record that the selected layers that lie in no block are left as they are."""
    blocks = topology.blocks(run.model)
    selected = Scope("", run.model, run.model).select(step.targets, step.skip, experts=True)
    outside = sorted(name for name in selected if not any(block.holds(name) for block in blocks))
    run.cover(step, [], {"it lies outside the blocks": outside} if outside else {})


def require_storable(step: Any, model: Any, label: str, integer: bool = True) -> None:
    """Raise ``ModelError`` for experts that a technique for linear layers alone could not leave as they are.

    For ``check_model`` of techniques whose ``select_layers`` has no ``experts``.
    """
    compressed.storable(Scope("", model, model), step.targets, step.skip, integer, label)


def weight_spec(
    in_features: int,
    bits: int,
    group_size: int | None,
    symmetric: bool = True,
    *,
    strategy: Literal["tensor", "channel", "group"] | None = None,
    format: Literal["int", "fp8", "nvfp4", "mxfp4"] = "int",
) -> GridSpec:
    """Return the grid of a weight with ``in_features`` columns.

    Args:
        in_features: inputs of the layer.
        bits: of a code.
        group_size: inputs that share a scale; the largest divisor of ``in_features`` up to it is used. None: no groups.
        symmetric: no zero points.
        strategy: which weights share a scale; None: ``"group"`` with a ``group_size``, else ``"channel"``.
        format: integer codes, float8 (e4m3), or 4-bit floats, which have groups of their own.
    """
    if format == "nvfp4" or format == "mxfp4":
        return GridSpec(4, format, "group", FLOAT4_GROUPS[format])
    size = fit_group_size(in_features, group_size) if group_size else None
    kind: Literal["float", "int"] = "float" if format == "fp8" else "int"
    return GridSpec(bits, kind, strategy or ("group" if group_size else "channel"), size, symmetric)


def keep_bits(step: Any, run: Run, bits: Mapping[str, int]) -> None:
    """Keep the bits of the weights of layers in the state of the step, for ``report_bits``."""
    run.state(step).__dict__.setdefault("bits", {}).update(bits)


def report_bits(step: Any, run: Run) -> None:
    """Record how many layers have weights of how many bits."""
    layers = Counter(run.state(step).__dict__.get("bits", {}).values())
    run.report(step, layers_by_bits={str(bits): count for bits, count in sorted(layers.items())})


def bits_phrase(layers_by_bits: Mapping[str, int]) -> str:
    """Return ``"4 bits"``, or if the layers differ ``"2 bits (1 layer), 4 bits (11 layers)"``."""
    if len(layers_by_bits) == 1:
        return f"{next(iter(layers_by_bits))} bits"
    return ", ".join(f"{bits} bits ({count} layer{'s' * (count != 1)})" for bits, count in layers_by_bits.items())


def report_errors(step: Any, run: Run, errors: Mapping[str, float]) -> None:
    """Record the relative squared output error of layers, and the mean over all layers so far."""
    run.report(step, relative_error={name: float(f"{error:.6g}") for name, error in errors.items()})
    found = run.reported(step)["relative_error"].values()
    run.report(step, mean_relative_error=float(f"{sum(found) / len(found):.6g}"))


def add_worst_layers(card: Card, title: str, errors: Mapping[str, float]) -> None:
    """Add a table of the five layers with the largest error to the card."""
    worst = sorted(errors, key=lambda name: errors[name], reverse=True)[:5]
    card.table(
        f"{title}: layers with the largest error",
        ["layer", "relative squared output error"],
        [[f"`{name}`", f"{errors[name]:.2e}"] for name in worst],
    )
