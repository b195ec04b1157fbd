"""Recipes of llm-compressor (``recipe.yaml``) as recipes of hf_optim.

A recipe of llm-compressor is a mapping ``..._stage: ..._modifiers: Name: fields``. Each modifier becomes a step with
the same result, where hf_optim has one; what has no counterpart is listed, never dropped in silence. Field names and
defaults are those of llm-compressor in August 2026 (commit ab1ba3e).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ...errors import RecipeError
from ...trust.bounds import shown
from ...trust.documents import MAX_RECIPE_BYTES, parse_json, parse_yaml, read_text
from ...trust.text import one_line
from ..config import OptimConfig
from ..traits import QUANTIZED
from . import pruning_modifiers as pruning
from . import quantizing_modifiers as quantizing
from .counterparts import Steps, adds
from .notes import Fields, Notes

# Fields of every modifier, and those that only decide how much memory or time a run takes.
BOOKKEEPING = ("index", "group", "initialized_", "finalized_", "started_", "ended_")
SPEED = ("offload_hessians", "offload_device", "sequential_update", "sequential_targets", "bypass_divisibility_checks")
# Modifiers that act during training.
SCHEDULED = ("MagnitudePruningModifier", "ConstantPruningModifier")
MAX_MODIFIERS = 100


@dataclass(frozen=True)
class Translation:
    """A translated recipe.

    Attributes:
        steps: of the recipe; empty if nothing had a counterpart.
        notes: what was left out.
    """

    steps: Steps
    notes: Notes

    def to_yaml(self, source: str) -> str:
        """Return the recipe as YAML, with the notes as comments above the steps.

        Args:
            source: the name of the file that was translated.
        """
        head = [f"Translated from {one_line(source)} (llm-compressor).", *self.notes.lines()]
        comments = "".join(f"# {one_line(line, 500)}\n" for line in head)
        return comments + yaml.safe_dump({"steps": self.steps}, sort_keys=False, width=110)


def translate_file(path: Path) -> Translation:
    """Read a recipe file of llm-compressor (YAML or JSON) and translate it.

    Raises ``RecipeError`` if it is not one, or if the steps do not compose.
    """
    text = read_text(path, error=RecipeError, max_bytes=MAX_RECIPE_BYTES)
    if path.suffix.lower() == ".json":
        data = parse_json(text, path.name, error=RecipeError)
    else:
        data = parse_yaml(text, path.name, error=RecipeError, what="a recipe of llm-compressor in plain YAML")
    try:
        return translate(data)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error


def translate(data: Any) -> Translation:
    """Translate a recipe of llm-compressor, as its YAML file is parsed.

    Raises ``RecipeError`` if it is not one, if a field has a value of the wrong type, or if the steps do not compose.
    """
    notes = Notes()
    steps: Steps = []
    modifiers = _with_formats(list(_modifiers(data, notes)))
    if not modifiers:
        raise RecipeError(
            "no modifier found: a recipe of llm-compressor has `NAME_stage: NAME_modifiers: Modifier: ...`"
        )
    for name, fields in modifiers[:MAX_MODIFIERS]:
        modifier = Fields(fields, one_line(name), notes)
        for field in BOOKKEEPING:
            modifier.take(field)
        modifier.drop("it decides memory and time only", *SPEED)
        if name not in SCHEDULED:
            modifier.drop("a one-shot step has no schedule", "start", "end", "update")
        make = MODIFIERS.get(name)
        if make is None:
            notes.missing.append(f"{one_line(name)}: {UNKNOWN.get(name, 'hf_optim has no technique for it')}")
            continue
        steps += make(modifier, notes, steps)
        modifier.rest()
    if len(modifiers) > MAX_MODIFIERS:
        raise RecipeError(f"{len(modifiers)} modifiers: at most {MAX_MODIFIERS} are translated")
    steps = _one_quantizer(steps, notes)
    if steps:
        OptimConfig.parse(steps).check()
    return Translation(steps, notes)


def _modifiers(data: Any, notes: Notes) -> Iterator[tuple[str, Any]]:
    """Yield name and fields of the modifiers, in their order, at any of the places where a recipe may have them."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"a recipe of llm-compressor is a mapping, not {shown(data)}")
    for key, value in data.items():
        name = str(key)
        if name.endswith("Modifier"):
            yield name, value
        elif name.endswith(("_stage", "_modifiers")) and isinstance(value, Mapping):
            yield from _modifiers(value, notes)
        elif name == "args" and value:
            notes.changed.append(f"args: {shown(value)}: variables are not filled in")
        elif name in ("run_type", "args", "metadata", "version") or value is None:
            continue
        else:
            raise RecipeError(
                f"{shown(name)} is neither a stage nor a group of modifiers nor a modifier of llm-compressor"
            )


def _with_formats(modifiers: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Give a GPTQ without a format that of the ``QuantizationModifier`` before it, which then makes no step."""
    found: list[tuple[str, Any]] = []
    for name, fields in modifiers:
        if name == "GPTQModifier" and not _has_format(fields):
            before = [i for i, (other, own) in enumerate(found) if other == "QuantizationModifier" and _has_format(own)]
            if before and (fields is None or isinstance(fields, dict)):
                fields = {**found.pop(before[-1])[1], **(fields or {})}
        found.append((name, fields))
    return found


def _has_format(fields: Any) -> bool:
    return isinstance(fields, dict) and bool(fields.get("scheme") or fields.get("config_groups"))


def _one_quantizer(steps: Steps, notes: Notes) -> Steps:
    """Keep the first step that quantizes: the layers of a recipe are quantized by one step."""
    kept: Steps = []
    for step in steps:
        if adds(step, QUANTIZED) and any(adds(one, QUANTIZED) for one in kept):
            layers = ", ".join(map(one_line, step.get("targets", ["Linear"])))
            notes.missing.append(
                f"a second group of quantized layers ({layers}: "
                f"{one_line(step.get('scheme') or step.get('bits', 8))}): one step quantizes all layers of a recipe"
            )
        else:
            kept.append(step)
    return kept


MODIFIERS: dict[str, Callable[[Fields, Notes, Steps], Steps]] = {
    "QuantizationModifier": quantizing.quantization,
    "GPTQModifier": quantizing.gptq,
    "AWQModifier": quantizing.awq,
    "AutoRoundModifier": quantizing.auto_round,
    "SmoothQuantModifier": quantizing.smoothquant,
    "SpinQuantModifier": quantizing.spinquant,
    "SparseGPTModifier": pruning.sparsegpt,
    "WandaPruningModifier": pruning.wanda,
    "MagnitudePruningModifier": pruning.magnitude,
    "ConstantPruningModifier": pruning.constant,
}
UNKNOWN = {
    "LogarithmicEqualizationModifier": "logarithmic equalization is not among hf_optim's techniques",
    "QuIPModifier": "it rotates each layer's inputs and outputs at run time, which no technique of hf_optim does",
    "REAPPruningModifier": "removing experts is not among hf_optim's techniques",
    "DistillationModifier": "see logit_kd of hf_optim, which trains",
}
