"""Shared by the techniques that quantize weights: the contract, the layers, the grid, and the errors they report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from hf_optim import Contract, Scope, compressed, traits
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import require_finite
from hf_optim.toolkit.quantization import GridSpec, fit_group_size

if TYPE_CHECKING:
    from hf_optim import Card, Run

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
    layers, skipped = compressed.storable(scope, step.targets, step.skip, label=run.label(step), **options)
    require_finite({f"{name}.weight": layer.weight for name, layer in layers.items()}, run.label(step))
    return layers, skipped


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
    format: Literal["int", "fp8"] = "int",
) -> GridSpec:
    """Return the grid of a weight with ``in_features`` columns.

    Args:
        in_features: inputs of the layer.
        bits: of a code.
        group_size: inputs that share a scale; the largest divisor of ``in_features`` up to it is used. None: no groups.
        symmetric: no zero points.
        strategy: which weights share a scale; None: ``"group"`` with a ``group_size``, else ``"channel"``.
        format: integer codes, or float8 (e4m3).
    """
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
