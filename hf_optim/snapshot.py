"""The state of a run as tensors and JSON, for Trainer checkpoints and for resuming a killed calibration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from .run import Run
from .traits import BUILT_IN

SCALARS = (str, int, float, bool, type(None))


def take(run: Run, inside: str = "") -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The run's masks (of parameters whose name starts with ``inside``), the steps' states, and its bookkeeping.

    Of a step's state, the attributes that are tensors or plain JSON types are kept; others must be derivable.
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
    }
    for position, step in enumerate(run.recipe.steps):
        plain = {}
        for key, value in vars(run.state(step)).items():
            if isinstance(value, torch.Tensor):
                tensors[f"state.{position}.{key}"] = value
            elif _is_json(value):
                plain[key] = value
        meta["states"][str(position)] = plain
        if (touched := run.touched(step)) is not None:
            names, skipped = touched
            meta["touched"][str(position)] = [sorted(names), {k: sorted(v) for k, v in sorted(skipped.items())}]
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, meta


def _is_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_json(inner) for key, inner in value.items())
    return isinstance(value, SCALARS) or (isinstance(value, (list, tuple)) and all(map(_is_json, value)))


def restore(run: Run, tensors: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
    """Put back what ``take`` took. Masks and patterns are added to those the run has."""
    added = {trait for step in run.recipe.steps for trait in step.contract().adds}
    traits = {str(trait): trait for trait in added.union(BUILT_IN)}
    run.stage_index, run.stage_entered = meta["stage_index"], meta["stage_entered"]
    run.traits |= {traits[name] for name in meta["traits"] if name in traits}
    run.nm_patterns |= {name: (keep, group) for name, (keep, group) in meta["nm_patterns"].items()}
    run.bit_plan |= meta.get("bit_plan", {})
    run.record.steps = dict(meta["steps"])
    run.record.notes = list(meta["notes"])
    for name, tensor in tensors.items():
        kind, rest = name.split(".", 1)
        if kind == "mask":
            run.masks[rest] = tensor
        else:
            number, key = rest.split(".", 1)
            setattr(run.state(run.recipe.steps[int(number)]), key, tensor)
    for position, step in enumerate(run.recipe.steps):
        vars(run.state(step)).update(meta["states"].get(str(position), {}))
        if (touched := meta["touched"].get(str(position))) is not None:
            run.touch(step, *touched)
