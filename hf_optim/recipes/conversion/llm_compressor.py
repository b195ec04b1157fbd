"""Recipes of llm-compressor (``recipe.yaml``) as recipes of hf_optim.

A recipe of llm-compressor is a mapping ``..._stage: ..._modifiers: Name: fields``. Each modifier becomes a step with
the same result, where hf_optim has one; what has no counterpart is listed, never dropped in silence. Field names and
defaults are those of llm-compressor 0.9 to 0.12 (August 2026).
"""

from __future__ import annotations

import re
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
from .notes import Fields, Notes
from .quantization_args import Group, read_groups

# Fields of every modifier, and those that only decide how much memory or time a run takes.
BOOKKEEPING = ("index", "group", "initialized_", "finalized_", "started_", "ended_")
SPEED = ("offload_hessians", "offload_device", "sequential_update", "sequential_targets", "bypass_divisibility_checks")
MAX_MODIFIERS = 100
HEADS = ("lm_head", "re:lm_head", "re:.*lm_head", "re:.*lm_head.*", "re:^lm_head$", "re:.*lm_head$")
# A name or pattern that ends in the number of a block: the linear layers inside are meant.
_BLOCK = re.compile(r"(\.\d+|\\d\+)\$?$")

Steps = list[dict[str, Any]]


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
    notes, steps = Notes(), []
    modifiers = list(_modifiers(data, notes))
    if not modifiers:
        raise RecipeError(
            "no modifier found: a recipe of llm-compressor has `NAME_stage: NAME_modifiers: Modifier: ...`"
        )
    for name, fields in modifiers[:MAX_MODIFIERS]:
        modifier = Fields(fields, one_line(name), notes)
        for field in BOOKKEEPING:
            modifier.take(field)
        modifier.drop("it decides memory and time only", *SPEED)
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


# -- quantization -----------------------------------------------------------------------------------------------------
def _quantization(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    return _quantizers("rtn", modifier, notes)


def _gptq(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    fields: dict[str, Any] = {}
    damp, block = modifier.number("dampening_frac", 0.01), modifier.number("block_size", 128)
    fields |= {"damp": damp} if damp != 0.01 else {}
    fields |= {"block_size": block} if block != 128 else {}
    order = modifier.take("actorder", "static") if "actorder" in modifier else ...
    return _quantizers("gptq", modifier, notes, fields, order)


def _quantizers(
    technique: str, modifier: Fields, notes: Notes, fields: Mapping[str, Any] | None = None, order: Any = ...
) -> Steps:
    """Return a step for each group of layers that one can quantize."""
    ignore = modifier.names("ignore")
    if modifier.take("kv_cache_scheme"):
        modifier.change("kv_cache_scheme has no counterpart: the cache keeps the dtype of the model")
    steps = []
    for group in read_groups(modifier, notes):
        step: dict[str, Any] = {"technique": technique, **_layers(modifier, group.targets, ignore), **group.fields}
        if technique == "gptq":
            step |= {**(fields or {}), **_act_order(modifier, group, order)}
        if group.refusal is None and (reason := _refused(step)):
            group = Group(group.targets, {}, refusal=reason)
        if group.refusal is None:
            steps.append(step)
        else:
            notes.missing.append(f"{modifier.label} for {', '.join(map(one_line, group.targets))}: {group.refusal}")
    return steps


def _refused(step: dict[str, Any]) -> str:
    """Return why a step does not take its fields; empty if it does."""
    try:
        OptimConfig.parse([step])
    except RecipeError as error:
        return str(error).removeprefix("step 1: ")
    return ""


def _act_order(modifier: Fields, group: Group, order: Any) -> dict[str, Any]:
    given = group.act_order if group.act_order is not None or order is ... else order
    given = "static" if given is None and order is ... else given
    if given in ("group", "dynamic", True):
        modifier.change("actorder: group also regroups the columns; here groups are of neighbouring columns (static)")
    elif given not in ("static", "weight", None, False):
        raise RecipeError(f"{modifier.label}: actorder must be static, weight or null, not {shown(given)}")
    return {} if given not in (None, False) else {"act_order": False}


def _layers(modifier: Fields, targets: list[str], ignore: list[str]) -> dict[str, Any]:
    """Return ``targets`` and ``skip`` of a step. The output head is left alone in hf_optim unless it is named."""
    skip = [name for name in ignore if name not in HEADS]
    if "Linear" in targets and len(skip) == len(ignore):
        modifier.change("it also takes the output head, which is left alone here unless targets names it")
    found: dict[str, Any] = {}
    if targets != ["Linear"]:
        found["targets"] = targets
    return {**found, **({"skip": skip} if skip else {})}


def _one_quantizer(steps: Steps, notes: Notes) -> Steps:
    """Keep the first step that quantizes: the layers of a recipe are quantized by one step."""
    kept: Steps = []
    for step in steps:
        if step["technique"] in ("rtn", "gptq") and any(one["technique"] in ("rtn", "gptq") for one in kept):
            layers = ", ".join(map(one_line, step.get("targets", ["Linear"])))
            notes.missing.append(
                f"a second group of quantized layers ({layers}: "
                f"{one_line(step.get('scheme') or step.get('bits', 8))}): one step quantizes all layers of a recipe"
            )
        else:
            kept.append(step)
    return kept


def _awq(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    return _without_search("scaling channels by the search of AWQ", modifier, notes)


def _auto_round(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    modifier.drop("it belongs to the search", "iters", "lr", "batch_size", "enable_torch_compile", "device_ids",
                  "disable_opt_rtn")  # fmt: skip
    return _without_search("learning to round by signed gradient descent (AutoRound)", modifier, notes)


def _without_search(what: str, modifier: Fields, notes: Notes) -> Steps:
    """Return the rounding alone (rtn), if the modifier quantizes, and report that what precedes it is missing."""
    modifier.drop("it belongs to the search", "mappings", "duo_scaling", "n_grid", "num_calibration_steps")
    quantizes = "scheme" in modifier or "config_groups" in modifier
    instead = "; the same format by rounding to nearest (rtn) is in its place" if quantizes else ""
    notes.missing.append(f"{modifier.label}: {what} is not among hf_optim's techniques{instead}")
    return _quantizers("rtn", modifier, notes) if quantizes else []


def _smoothquant(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    alpha = modifier.number("smoothing_strength", 0.5)
    if modifier.take("algorithm", "smoothquant") != "smoothquant":
        notes.missing.append(f"{modifier.label}: log_equalization is not among hf_optim's techniques")
        modifier.drop("it belongs to the modifier", "mappings", "ignore", "num_calibration_steps")
        return []
    if modifier.take("mappings"):
        notes.harmless.append(
            f"{modifier.label}: mappings (hf_optim finds the norms and the layers that read them in the model itself)"
        )
    if ignore := modifier.names("ignore"):
        modifier.change(f"ignore names norms ({', '.join(map(one_line, ignore))}); skip of smoothquant names layers")
    modifier.drop("the calibration data says how much is read", "num_calibration_steps", "calibration_function")
    return [{"technique": "smoothquant", "alpha": alpha}]


# -- pruning ----------------------------------------------------------------------------------------------------------
def _sparsegpt(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    damp = modifier.number("dampening_frac", 0.01)
    modifier.drop("weights are refitted all at once", "block_size")
    preserve = modifier.flag("preserve_sparsity_mask", False)
    if not preserve and any(step["technique"] in PRUNES for step in before):
        modifier.change("preserve_sparsity_mask: false; here the zeros of an earlier step stay")
    step = {"technique": "nm", "score": "obs", "compensate": True, **({"damp": damp} if damp != 0.01 else {})}
    return _one_shot(step, None, modifier, notes)


def _wanda(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    unstructured = {"technique": "magnitude", "score": "activation", "scope": "row"}
    return _one_shot({"technique": "nm", "score": "activation"}, unstructured, modifier, notes)


def _one_shot(step: dict[str, Any], unstructured: dict[str, Any] | None, modifier: Fields, notes: Notes) -> Steps:
    """Return the step for a mask structure; ``unstructured`` is the one for 0:0, or None if there is none."""
    sparsity, structure = modifier.take("sparsity"), modifier.take("mask_structure", "0:0")
    targets, ignore = modifier.names("targets", ("Linear",)), modifier.names("ignore")
    if modifier.take("sparsity_profile"):
        modifier.take("owl_m"), modifier.take("owl_lmbda")
        modifier.change("sparsity_profile: owl has no counterpart: every layer has the same sparsity")
    found = re.fullmatch(r"(\d{1,4}):(\d{1,4})", structure) if isinstance(structure, str) else None
    if found is None:
        raise RecipeError(f"{modifier.label}: mask_structure must be written N:M, such as 2:4, not {shown(structure)}")
    removed, group = int(found[1]), int(found[2])
    layers = _layers(modifier, [_inside_block(name) for name in targets], ignore)
    if removed == 0:
        if isinstance(sparsity, bool) or not isinstance(sparsity, (int, float)):
            notes.missing.append(
                f"{modifier.label}: a sparsity for each layer ({shown(sparsity)}); one for all is known"
            )
            return []
        if unstructured is None:
            notes.missing.append(f"{modifier.label}: unstructured sparsity (mask_structure 0:0); N:M is known")
            return []
        return [{**unstructured, "sparsity": sparsity, **layers}]
    if removed >= group:
        raise RecipeError(f"{modifier.label}: mask_structure {structure} leaves no weights")
    return [{**step, "keep": group - removed, "group": group, **layers}]


def _inside_block(target: str) -> str:
    """Return a target, or the pattern of all layers inside if it names blocks (``model.layers.0``)."""
    if not _BLOCK.search(target):
        return target
    return f"{target.removesuffix('$')}\\." if target.startswith("re:") else f"{target}.*"


def _magnitude(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    final, initial = modifier.number("final_sparsity", 0.5), modifier.number("init_sparsity", 0.0)
    begin, end, every = (modifier.number(name) for name in ("start", "end", "update"))
    if modifier.take("update_scheduler", "cubic") not in ("cubic", None):
        modifier.change("update_scheduler: the ramp of gmp is cubic")
    modifier.take("scheduler_args")
    if modifier.take("mask_structure", "unstructured") not in ("unstructured", None):
        modifier.change("mask_structure: gmp removes single weights")
    modifier.drop("masks are kept in any training that follows", "leave_enabled")
    scope = {"scope": "global"} if modifier.flag("apply_globally", False) else {}
    targets = [name.removesuffix(".weight").removesuffix("weight") for name in modifier.names("targets", ("Linear",))]
    layers = _layers(
        modifier, ["Linear" if name in ("__ALL_PRUNABLE__", "__ALL__") else name for name in targets], HEADS
    )
    if begin is None or end is None or end <= begin:
        return [{"technique": "magnitude", "sparsity": final, **scope, **layers}]
    modifier.change(
        f"start: {begin}, end: {end} and update: {every} are epochs, and were left out: gmp's begin, end and every are "
        "optimizer steps, or shares of the training"
    )
    return [{"technique": "gmp", "sparsity": final, "initial": initial, **scope, **layers}]


def _constant(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    modifier.drop("masks hold from their step on", "start", "end", "update", "targets")
    if any(step["technique"] in PRUNES for step in before):
        notes.harmless.append(f"{modifier.label} (hf_optim keeps the zeros of every pruning step in later training)")
    else:
        notes.missing.append(f"{modifier.label}: zeros that the checkpoint already has are not made into masks")
    return []


PRUNES = ("nm", "magnitude", "gmp")
MODIFIERS: dict[str, Callable[[Fields, Notes, Steps], Steps]] = {
    "QuantizationModifier": _quantization,
    "GPTQModifier": _gptq,
    "AWQModifier": _awq,
    "AutoRoundModifier": _auto_round,
    "SmoothQuantModifier": _smoothquant,
    "SparseGPTModifier": _sparsegpt,
    "WandaPruningModifier": _wanda,
    "MagnitudePruningModifier": _magnitude,
    "ConstantPruningModifier": _constant,
}
UNKNOWN = {
    "LogarithmicEqualizationModifier": "logarithmic equalization is not among hf_optim's techniques",
    "QuIPModifier": "rotations of weights and inputs are not among hf_optim's techniques",
    "SpinQuantModifier": "rotations of weights and inputs are not among hf_optim's techniques",
    "REAPPruningModifier": "removing experts is not among hf_optim's techniques",
    "DistillationModifier": "see logit_kd of hf_optim, which trains",
}
