"""Refuse what cannot work before anything is calibrated, from configurations, headers and free space.

``check_recipe`` checks that the recipe composes for the model; ``preflight`` everything else that does not need a
weight: that the shards hold what the model needs, that the steps find layers they can work on, that there is room for
the result, and roughly how much memory it will take. Both take seconds, whatever the size of the model.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import PreTrainedConfig

from ...compressed.reload_check import require_reloadable_steps
from ...compressed.storability import storable
from ...errors import CheckpointError, ModelError
from ...evaluation.reported import format_bytes
from ...recipes.config import OptimConfig
from ...recipes.contract import Reload
from ...recipes.streamable import require_streamable
from ...recipes.technique import Technique
from ...recipes.traits import BITS_ASSIGNED, QUANTIZED, Trait
from ...runs.memory import host_memory
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.checkpoint.model_config import build_meta_model
from ...toolkit.checkpoint.safetensors import TORCH_DTYPES, SafetensorsHeaders
from ...toolkit.quantization.grids import fit_group_size
from ...trust.bounds import first_line
from .estimate import bytes_per_weight, estimate, traits_of_config

if TYPE_CHECKING:
    from ...checkpoints.meta_model import MetaModel
    from ...checkpoints.source import ModelSource

log = logging.getLogger(__name__)

# Python, torch and transformers themselves, as measured; the estimates of memory are upwards of it.
INTERPRETER = 600 * 2**20


@dataclass(frozen=True)
class Findings:
    """The result of ``preflight``.

    Attributes:
        meta_model: the model on the meta device; None if its weights are not on this machine, or it cannot be built.
        estimates: ``estimate(recipe, config)``, with ``host_bytes`` and ``activation_bytes``.
        notes: warnings about settings that will be adjusted.
    """

    meta_model: MetaModel | None
    estimates: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def check_recipe(source: ModelSource, recipe: OptimConfig, dense: bool = False) -> frozenset[Trait]:
    """Check a recipe against the configuration of a model, and return the traits of the result.

    Raises ``RecipeError`` if the recipe does not compose, or if the streamed driver cannot run it; ``dense`` says that
    the dense equivalent is to be written.
    """
    traits = recipe.check(traits_of_config(source.config))
    if recipe.driver == "streamed":
        require_streamable(recipe, dense)
    return traits


def preflight(
    source: ModelSource, recipe: OptimConfig, output: Path | None = None, *, offline: bool = False, dense: bool = False
) -> Findings:
    """Check everything else that can be refused without reading a weight. ``check_recipe`` comes before it.

    Args:
        source: the model. With ``offline`` its shards are checked only if they are on this machine.
        recipe: what is to be done with it.
        output: the directory that is to be written.
        dense: the dense equivalent is to be written.

    Raises ``OptimError`` for the first problem, naming the module, tensor or file.
    """
    config = source.config
    if output is not None:
        require_writable(output)
    if recipe.spill is not None:
        require_writable(Path(recipe.spill) / "activations")
    meta_model = _meta_model(source, recipe, offline)
    model: Any = meta_model.model if meta_model is not None else build_meta_model(config, source.trust_remote_code)
    notes: list[str] = []
    if meta_model is not None:
        notes += check_shards(meta_model, source.model, recipe.driver == "streamed")
    notes += check_steps(recipe, model)
    if not dense:
        require_reloadable_steps(recipe, model)
    estimates = estimate(recipe, config, source.trust_remote_code)
    estimates |= _memory(recipe, config, model, estimates)
    if output is not None:
        _require_space(output, estimates["bytes_after"] or estimates["bytes_before"], "the result")
    if recipe.spill is not None:
        _require_space(Path(recipe.spill), estimates["activation_bytes"], "the activations that are spilled")
    _require_memory(recipe, estimates)
    return Findings(meta_model, estimates, notes)


def _meta_model(source: ModelSource, recipe: OptimConfig, offline: bool) -> MetaModel | None:
    from ...checkpoints import meta_model

    if offline and not meta_model.is_local(source):
        return None
    try:
        return meta_model.build(source)
    except ModelError as error:
        # The other drivers can load code that cannot be loaded without weights.
        if recipe.driver == "streamed":
            raise
        log.debug("not checked without weights: %s", error)
        return None


# -- the shards -------------------------------------------------------------------------------------------------------
def check_shards(found: MetaModel, source: str, strict: bool) -> list[str]:
    """Check that the shards hold every tensor of the model; return warnings about additional tensors.

    ``strict`` refuses any missing tensor; otherwise only those of blocks (a new head is trained later). Raises
    ``CheckpointError``.
    """
    kind = type(found.model).__name__
    inside = tuple(f"{block.name}." for block in topology.blocks(found.model))
    missing = [name for name in found.missing if strict or name.startswith(inside)]
    if missing:
        raise CheckpointError(
            f"{source} has no weights for {len(missing)} tensors of {kind} ({', '.join(missing[:3])}"
            f"{' ...' if len(missing) > 3 else ''}): load it with the class that its config.json names, or fetch the "
            "missing shards"
        )
    for entry in SafetensorsHeaders(found.files).entries.values():
        if entry.type not in TORCH_DTYPES:
            raise CheckpointError(
                f"{entry.file.name}: {entry.key} has the type {entry.type}, which hf_optim cannot read"
            )
    extra = found.unexpected
    return [f"{len(extra)} tensors of the checkpoint do not belong to {kind}: {', '.join(extra[:3])}"] if extra else []


# -- the steps --------------------------------------------------------------------------------------------------------
def check_steps(recipe: OptimConfig, model: Any) -> list[str]:
    """Check that the steps find layers to work on; return warnings about settings that will be adjusted."""
    notes: list[str] = []
    for position, step in enumerate(recipe.steps):
        if step.changes_architecture():
            break  # later steps work on another model
        label = f"step {position + 1} ({step.name})"
        _require_targets(step, model, label)
        if QUANTIZED in step.contract().adds and step.reload() == Reload.STOCK_FORMAT:
            if recipe.driver == "streamed" and topology.has_experts(model):
                _check_streamed_experts(recipe, step, model, label)
            notes += _check_layers(step, model, label)
    if recipe.driver in ("streamed", "blockwise") and not topology.blocks(model):
        raise ModelError(f"driver {recipe.driver}: no sequence of blocks was found in {type(model).__name__}")
    needs_data = any(step.implements("calibrate") and step.needs_data() for step in recipe.steps)
    if recipe.driver in ("streamed", "blockwise") and needs_data and (reason := topology.exchanged_state(model)):
        raise ModelError(f"driver {recipe.driver}: {reason}, so blocks cannot run alone; use driver: whole_model")
    return notes


def _require_targets(step: Technique, model: nn.Module, label: str) -> None:
    targets = getattr(step, "targets", None)
    if not isinstance(targets, tuple) or not all(isinstance(target, str) for target in targets):
        return
    try:
        # Any module counts: targets of a step need not be linears (embeddings, norms).
        everything = {**dict(model.named_modules()), **topology.linears(model)}
        topology.match(everything, targets, tuple(getattr(step, "skip", ())))
    except ValueError as error:
        raise ModelError(f"{label}: {error} in {type(model).__name__}") from error


def _check_layers(step: Technique, model: Any, label: str) -> list[str]:
    """Check which layers a quantizing step can store, and in what groups. Models with experts have other rules."""
    if topology.has_experts(model):
        return []
    targets, skip = getattr(step, "targets", ("Linear",)), tuple(getattr(step, "skip", ()))
    scope = Scope("", model, model)
    try:
        layers, skipped = storable(scope, targets, skip, label=label)
    except ValueError as error:
        raise ModelError(f"{label}: {error}") from error
    if not layers:
        why = "; ".join(f"{reason}: {_few(names)}" for reason, names in sorted(skipped.items()))
        raise ModelError(f"{label} found nothing to work on in {type(model).__name__}. {why or 'No module matched'}")
    notes = [f"{label} leaves out {_few(names)} ({reason})" for reason, names in sorted(skipped.items())]
    group_size = getattr(step, "group_size", None)
    return notes + (list(_adjusted_groups(layers, group_size, label)) if group_size else [])


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


def _adjusted_groups(layers: dict[str, nn.Linear], group_size: int, label: str) -> Iterator[str]:
    adjusted: dict[tuple[int, int], list[str]] = {}
    for name, layer in layers.items():
        size = fit_group_size(layer.in_features, group_size)
        if size != min(group_size, layer.in_features):
            adjusted.setdefault((layer.in_features, size), []).append(name)
    for (width, size), names in sorted(adjusted.items()):
        yield f"{label}: group_size {group_size} does not divide the {width} inputs of {_few(names)}: groups of {size}"


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# -- room -------------------------------------------------------------------------------------------------------------
def require_writable(path: Path) -> None:
    """Raise ``CheckpointError`` unless a directory can be created at ``path``."""
    home = _existing(path)
    found = next((each for each in (path, *path.absolute().parents) if os.path.exists(each)), home)
    if not os.path.isdir(found):
        raise CheckpointError(f"cannot write to {path}: {found} is not a directory")
    try:
        with tempfile.TemporaryDirectory(dir=home, prefix=".hf-optim-"):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CheckpointError(f"cannot write to {path}: {reason} ({home})") from error


def _existing(path: Path) -> Path:
    """Return the directory, or its nearest parent that exists."""
    path = path.absolute()
    return next((each for each in (path, *path.parents) if os.path.isdir(each)), Path("/"))


def _require_space(path: Path, needed: int, what: str) -> None:
    free = shutil.disk_usage(_existing(path)).free
    if needed > free:
        raise CheckpointError(
            f"not enough space for {what} at {path}: about {format_bytes(needed)} are needed, "
            f"{format_bytes(free)} are free"
        )


def _memory(recipe: OptimConfig, config: PreTrainedConfig, model: Any, estimates: dict[str, Any]) -> dict[str, Any]:
    """Estimate the bytes of the activations between blocks, and the peak of host memory, from shapes."""
    width = bytes_per_weight(config)
    hidden = getattr(config.get_text_config(), "hidden_size", None) or 0
    streams = 3 if any(step.implements("calibrate") and step.needs_teacher() for step in recipe.steps) else 1
    activations = estimates["calibration_tokens"] * hidden * width * streams
    host = INTERPRETER + (0 if recipe.spill is not None else activations)
    if recipe.driver == "streamed":
        inside = [block.name for block in topology.blocks(model)]
        outside = [
            p.numel() for n, p in model.named_parameters() if not any(n.startswith(f"{name}.") for name in inside)
        ]
        # The current block and the next one being read; or the modules outside the blocks, one at a time.
        host += max(2 * estimates["block_bytes"], max(outside, default=0) * width + estimates["block_bytes"])
    else:
        host += estimates["bytes_before"]
    return {"activation_bytes": activations, "host_bytes": host}


def _require_memory(recipe: OptimConfig, estimates: dict[str, Any]) -> None:
    total = host_memory()
    needed = estimates["host_bytes"]
    if total is None or needed <= total:
        return
    remedy = "--driver streamed holds one block at a time"
    if recipe.driver == "streamed":
        remedy = "give fewer or shorter samples" if recipe.spill else "--spill DIR keeps the activations on disk"
    raise ModelError(
        f"driver {recipe.driver} needs about {format_bytes(needed)} of memory for this, and this machine has "
        f"{format_bytes(total)}: {remedy}"
    )
