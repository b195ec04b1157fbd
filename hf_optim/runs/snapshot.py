"""The state of a run as tensors and JSON, for Trainer checkpoints and for resuming a killed calibration."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import nn

from ..errors import CheckpointError
from ..recipes.field_checks import admits_json
from ..recipes.technique import Technique
from ..recipes.traits import BUILT_IN
from ..toolkit.distributed import fsdp
from ..trust.bounds import shown
from .masking import wrapped_parameter
from .run import Run, StageState, is_plain

# Fields that decide where something runs or is stored, not what is computed: they may differ when training is resumed.
# So may all fields of a step whose stage had not begun.
META: Mapping[str, Any] = {
    "stage_index": int,
    "stage_entered": bool,
    "traits": list[str],
    "nm_patterns": dict[str, list[int]],
    "bit_plan": dict[str, Any],
    "steps": dict[str, Any],
    "notes": list[str],
    "states": dict[str, dict[str, Any]],
    "touched": dict[str, list[Any]],
    "recipe": list[str],
    "fields": list[dict[str, Any]],
}
OPTIONAL = ("bit_plan", "recipe", "fields")  # of snapshots of earlier versions
FREE_FIELDS = ("device", "cache")
FOLDER_FIELDS = ("teacher",)  # that may name a folder


def take(run: Run, inside: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Return the tensors (masks, states of steps) and metadata of a run, for parameters named ``inside...``.

    Of a step's state, attributes that are tensors or plain JSON types are kept; others must be derivable.
    """
    tensors = {f"mask.{name}": mask for name, mask in run.masks.items() if name.startswith(inside)}
    meta: dict[str, Any] = {
        "stage_index": run.stage_index,
        "stage_entered": run.stage_entered,
        "traits": sorted(str(trait) for trait in run.traits),
        "nm_patterns": {name: list(pattern) for name, pattern in run.nm_patterns.items() if name.startswith(inside)},
        "bit_plan": dict(run.bit_plan),
        "steps": run.record.steps,
        "notes": run.record.notes,
        "states": {},
        "touched": {},
        "recipe": [step.name for step in run.recipe.steps],
        "fields": [_fields(step) for step in run.recipe.steps],
    }
    for position, step in enumerate(run.recipe.steps):
        plain = {}
        for key, value in vars(run.state(step)).items():
            if isinstance(value, torch.Tensor):
                tensors[f"state.{position}.{key}"] = value
            elif is_plain(value):
                plain[key] = value
        meta["states"][str(position)] = plain
        if (covered := run.covered(step)) is not None:
            names, skipped = covered
            meta["touched"][str(position)] = [sorted(names), {k: sorted(v) for k, v in sorted(skipped.items())}]
    return {name: fsdp.full_tensor(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}, meta


def _fields(step: Technique) -> dict[str, Any]:
    # Values that are not plain JSON cannot be compared.
    fields = {key: value for key, value in step.to_dict().items() if key != "technique" and is_plain(value)}
    return {key: _real_path(key, value) for key, value in fields.items()}


def _real_path(key: str, value: Any) -> Any:
    """Return the value of a field; of a folder its real path, so that it may be named in another way."""
    is_folder = key in FOLDER_FIELDS and isinstance(value, str) and os.path.isdir(value)
    return os.path.realpath(value) if is_folder else value


@torch.no_grad()
def _put(state: SimpleNamespace, key: str, tensor: torch.Tensor) -> None:
    """Copy into the parameter of that name and shape, which an optimizer may hold; otherwise set the attribute."""
    there = getattr(state, key, None)
    if isinstance(there, nn.Parameter) and there.shape == tensor.shape and not fsdp.is_sharded(there):
        there.copy_(tensor)
    else:
        setattr(state, key, tensor)


def require_well_formed(run: Run, tensors: Mapping[str, Any], meta: Any, home: Path) -> None:
    """Raise ``CheckpointError`` unless tensors and metadata have the names and types that ``take`` gives them."""
    if not isinstance(meta, dict):
        raise CheckpointError(f"the state of the run in {home} is corrupt: it is {shown(meta)}, not a mapping")
    for key, hint in META.items():
        if (key not in OPTIONAL and key not in meta) or (key in meta and not admits_json(hint, meta[key])):
            raise CheckpointError(f"the state of the run in {home} is corrupt: {key} is {shown(meta.get(key))}")
    if not 0 <= meta["stage_index"] <= len(run.stages):
        raise CheckpointError(f"the state of the run in {home} is corrupt: it has no stage {meta['stage_index']}")
    numbers = {str(position) for position in range(len(run.recipe.steps))}
    for name in tensors:
        kind, _, rest = name.partition(".")
        if kind != "mask" and not (kind == "state" and rest.partition(".")[0] in numbers):
            raise CheckpointError(f"the state of the run in {home} is corrupt: it has a tensor {shown(name)}")


def require_same(run: Run, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any], home: Path) -> None:
    """Raise ``CheckpointError`` naming the first difference if a snapshot is not of this recipe and model.

    The run is not changed. Snapshots without names of steps are compared by their number, those without fields by the
    names.
    """
    mine = [step.name for step in run.recipe.steps]
    theirs = meta.get("recipe", mine)
    if len(meta["states"]) != len(mine) or len(theirs) != len(mine):
        raise CheckpointError(
            f"{home} was written with another recipe ({len(meta['states'])} steps, and this one has {len(mine)})"
        )
    for place, (here, there) in enumerate(zip(mine, theirs, strict=True)):
        if here != there:
            raise CheckpointError(
                f"{home} was written with another recipe: step {place + 1} was {there}, and here it is {here}"
            )
    for step, name, saved, given, free in _changes(run, meta):
        if not free:
            raise CheckpointError(
                f"{run.label(step)}: {home} was written with {name}={saved!r}, and here it is {given!r}: resume with "
                f"{name}={saved!r}, or start again from its weights; nothing was changed"
            )
    for name, mask in tensors.items():
        if name.startswith("mask."):
            _require_fit(run, name.removeprefix("mask."), mask, home)


def _changes(run: Run, meta: Mapping[str, Any]) -> Iterator[tuple[Technique, str, Any, Any, bool]]:
    """Yield fields that differ from the snapshot: step, name, saved and current value, and whether they may differ."""
    begun = {id(step) for stage in run.stages[: meta["stage_index"] + 1] for step in stage.steps}
    for step, there in zip(run.recipe.steps, meta.get("fields", ()), strict=False):
        here, defaults = _fields(step), {f.name: f.default for f in dataclasses.fields(cast(Any, step))}
        for name in sorted({*here, *there}):
            saved, given = (_real_path(name, _plain(fields.get(name, defaults.get(name)))) for fields in (there, here))
            # Compared as text: where a field is a position in training, 1 is a step and 1.0 a fraction.
            if json.dumps(saved) != json.dumps(given):
                yield step, name, saved, given, name in FREE_FIELDS or id(step) not in begun


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _require_fit(run: Run, name: str, mask: torch.Tensor, home: Path) -> None:
    remedy = "resume with the model that was trained there; nothing was changed"
    try:
        parameter = wrapped_parameter(run.model, name)
    except AttributeError:
        raise CheckpointError(
            f"{home} has the masks of another model: {name} has a mask there, and {type(run.model).__name__} has no "
            f"such parameter; {remedy}"
        ) from None
    if parameter.shape != mask.shape or mask.dtype != torch.bool:
        raise CheckpointError(
            f"{home} has the masks of another model: that of {name} is {mask.dtype} {tuple(mask.shape)}, and the "
            f"parameter {tuple(parameter.shape)}; {remedy}"
        )


def restore(run: Run, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Restore what ``take`` returned. Masks and patterns are added to those the run has.

    A parameter in a step's state stays the same object and takes the value: the step may train it through
    ``parameter_groups``, and finds it with its optimizer state when training is resumed.
    """
    added = {trait for step in run.recipe.steps for trait in step.contract().adds}
    traits = {str(trait): trait for trait in added.union(BUILT_IN)}
    run.stage_index = meta["stage_index"]
    run.stage_state = StageState.ENTERED if meta["stage_entered"] else StageState.PENDING
    run.traits |= {traits[name] for name in meta["traits"] if name in traits}
    run.nm_patterns |= {name: (keep, group) for name, (keep, group) in meta["nm_patterns"].items()}
    run.bit_plan |= meta.get("bit_plan", {})
    run.record.steps = dict(meta["steps"])
    run.record.notes = list(meta["notes"])
    for step, name, saved, given, _ in _changes(run, meta):
        run.record.note(f"{run.label(step)}: resumed with {name}={given!r}, where it was {saved!r}")
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "mask":
            run.masks[rest] = tensor
        else:
            number, key = rest.split(".", 1)
            _put(run.state(run.recipe.steps[int(number)]), key, tensor)
    for position, step in enumerate(run.recipe.steps):
        vars(run.state(step)).update(meta["states"].get(str(position), {}))
        if (touched := meta["touched"].get(str(position))) is not None:
            run.cover(step, *touched)
