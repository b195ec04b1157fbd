"""Check which layers the steps of a recipe find to work on in a model without weights."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ...calibration.steps import no_layer
from ...compressed.step_scheme import packs_codes
from ...compressed.storability import storable, takes_embeddings
from ...errors import ModelError
from ...recipes.config import OptimConfig
from ...recipes.contract import Reload
from ...recipes.technique import Technique
from ...recipes.traits import BITS_ASSIGNED, QUANTIZED
from ...runs.coverage import TOWERS, patterns_of, require_effective
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.quantization import adjusted_groups, adjusted_message, float4, stored_bits
from ...toolkit.topology.selection import PatternError


def check_steps(recipe: OptimConfig, model: Any) -> list[str]:
    """Check that the steps find layers to work on; return warnings about settings that will be adjusted."""
    notes: list[str] = []
    for position, step in enumerate(recipe.steps):
        if step.changes_architecture():
            break  # later steps work on another model
        label = f"step {position + 1} ({step.name})"
        require_effective(step, model, label)
        notes += _towers_left_alone(step, model, label)
        if QUANTIZED in step.contract().adds and step.reload() == Reload.STOCK_FORMAT:
            if recipe.driver == "streamed" and topology.has_experts(model):
                _check_streamed_experts(recipe, step, model, label)
            notes += _check_layers(step, model, label)
    if recipe.driver == "streamed" or (recipe.driver == "blockwise" and _is_traceable(model)):
        topology.require_blocks(model, recipe.driver)
    needs_data = any(step.implements("calibrate") and step.needs_data() for step in recipe.steps)
    by_block = recipe.driver in ("streamed", "blockwise") and needs_data and _is_traceable(model)
    if by_block and (reason := topology.exchanged_state(model)):
        raise ModelError(f"driver {recipe.driver}: {reason}, so blocks cannot run alone; use driver: whole_model")
    return notes


def _is_traceable(model: Any) -> bool:
    """Return False if blocks are found only once the weights of the model are read."""
    try:
        topology.blocks(model)
    except topology.WithoutWeightsError:
        return False
    return True


def _towers_left_alone(step: Technique, model: Any, label: str) -> Iterator[str]:
    """Yield a note for each tower that the targets of a step leave alone because they name the language model."""
    patterns = patterns_of(step)
    left = topology.left_alone(model, *patterns) if patterns is not None else {}
    for role in TOWERS:
        if names := left.get(str(role)):
            yield f"{label} leaves the {role} alone ({_few(names)}): a pattern of its names in targets includes it"


def _check_layers(step: Technique, model: Any, label: str) -> list[str]:
    """Check which layers a quantizing step can store, and in what groups. Models with experts have other rules."""
    if topology.has_experts(model):
        return []
    targets, skip = getattr(step, "targets", ("Linear",)), tuple(getattr(step, "skip", ()))
    scope = Scope("", model, model)
    try:
        layers, skipped = storable(scope, targets, skip, label=label, embeddings=takes_embeddings(step))
    except PatternError as error:
        raise ModelError(f"{label}: {error}") from error
    if not layers:
        left = {**topology.left_alone(model, targets, skip), **skipped}
        raise ModelError(no_layer(label, type(model).__name__, left))
    notes = [f"{label} leaves out {_few(names)} ({reason})" for reason, names in sorted(skipped.items())]
    # 4-bit floats have groups of their format, whatever the step says.
    has_groups = getattr(step, "group_size", None) and getattr(step, "format", "int") not in float4.GROUPS
    return notes + (list(_adjusted_groups(layers, step, model, label)) if has_groups else [])


def _check_streamed_experts(recipe: OptimConfig, step: Technique, model: Any, label: str) -> None:
    """Refuse experts that stock transformers cannot read, and experts of several schemes, before a block is read."""
    if any(BITS_ASSIGNED in other.contract().adds for other in recipe.steps):
        raise ModelError(
            f"{label}: other bits are assigned to other layers. Stock transformers decodes the experts of all blocks "
            "by one scheme, which the streamed driver cannot know when it writes the first block; use driver: blockwise"
        )
    integer = getattr(step, "format", "int") == "int" and getattr(step, "bits", 8) is not None
    targets, skip = getattr(step, "targets", ("Linear",)), tuple(getattr(step, "skip", ()))
    symmetric = getattr(step, "symmetric", True)
    storable(Scope("", model, model), targets, skip, integer, label, experts=True, symmetric=symmetric)


def _adjusted_groups(layers: dict[str, nn.Module], step: Technique, model: Any, label: str) -> Iterator[str]:
    """Yield a warning for each width that the group size of a step does not divide, with the bits of a weight."""
    group_size, bits = getattr(step, "group_size", 1), getattr(step, "bits", 8)
    symmetric = getattr(step, "symmetric", True)
    widths = {name: layer.in_features for name, layer in layers.items() if isinstance(layer, nn.Linear)}
    scale_bits = 8 * model.dtype.itemsize
    packed = packs_codes(step, model, widths)
    for (width, size), names in adjusted_groups(widths, group_size).items():
        stored = stored_bits(bits, width, size, scale_bits, packed=packed, zero_point=not symmetric)
        yield f"{label}: {adjusted_message(names, width, size, group_size, bits, stored)}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
