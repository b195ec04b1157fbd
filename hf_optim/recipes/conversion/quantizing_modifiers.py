"""Modifiers of llm-compressor that quantize, or prepare for it, as steps."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import RecipeError
from ...trust.bounds import shown
from ...trust.text import one_line
from ..config import OptimConfig
from .counterparts import Steps, counterpart
from .notes import Fields, Notes
from .quantization_args import Group, read_groups

HEADS = ("lm_head", "re:lm_head", "re:.*lm_head", "re:.*lm_head.*", "re:^lm_head$", "re:.*lm_head$")


def quantization(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    return _quantizers("rounding", modifier, notes)


def gptq(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    fields: dict[str, Any] = {}
    damp, block = modifier.number("dampening_frac", 0.01), modifier.number("block_size", 128)
    fields |= {"damp": damp} if damp != 0.01 else {}
    fields |= {"block_size": block} if block != 128 else {}
    order = modifier.take("actorder", "static") if "actorder" in modifier else ...
    return _quantizers("compensated", modifier, notes, fields, order)


def _quantizers(
    kind: str, modifier: Fields, notes: Notes, fields: Mapping[str, Any] | None = None, order: Any = ...
) -> Steps:
    """Return a step for each group of layers that one can quantize."""
    ignore = modifier.names("ignore")
    if modifier.take("kv_cache_scheme"):
        modifier.change("kv_cache_scheme has no counterpart: the cache keeps the dtype of the model")
    steps = []
    groups = read_groups(modifier, notes)
    for group in groups:
        layers = layers_of(modifier, group.targets, ignore)
        step: dict[str, Any] = {**counterpart(kind), **layers, **group.fields}
        reason, instead = group.refusal or _refused(step), ""
        if reason and kind != "rounding" and group.refusal is None:
            reason = f"{step['technique']} cannot write this format"
            step = {**counterpart("rounding"), **layers, **group.fields}
            instead = "; rounding to nearest (rtn) to the same format is in its place"
        else:
            step |= fields or {}
            step |= _act_order(modifier, group, order) if kind == "compensated" else {}
        if not reason or instead:
            steps.append(step)
        if reason:
            where = ", ".join(map(one_line, group.targets))
            notes.missing.append(f"{modifier.label} for {where}: {reason}{instead}")
    if any("skip" in step for step in steps):
        notes.hints.append(
            f"{modifier.label}: remove the patterns of skip that match nothing in your model; hf_optim refuses those"
        )
    if not groups:
        notes.missing.append(f"{modifier.label}: it names no format (scheme or config_groups)")
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


def awq(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    modifier.drop("it belongs to the search", "mappings", "duo_scaling", "n_grid", "num_calibration_steps")
    if "scheme" not in modifier and "config_groups" not in modifier:
        notes.missing.append(
            f"{modifier.label}: it names no format (scheme or config_groups), and {counterpart('scaled')['technique']} "
            "searches for one: add the step by hand, with the bits and groups of the step that quantizes"
        )
        return []
    rounding = _quantizers("rounding", modifier, notes)
    scaling = [{**step, **counterpart("scaled")} for step in rounding]
    notes.missing += [f"{modifier.label}: {reason}" for reason in map(_refused, scaling) if reason]
    return [*(step for step in scaling if not _refused(step)), *rounding]


def auto_round(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    modifier.drop("it says how the search runs", "enable_torch_compile", "device_ids", "disable_opt_rtn")
    fields: dict[str, Any] = {}
    steps, size, rate = modifier.number("iters", 200), modifier.number("batch_size", 8), modifier.take("lr")
    fields |= {"steps": steps} if steps != 200 else {}
    fields |= {"batch_size": size} if size != 8 else {}
    fields |= {"learning_rate": rate} if rate is not None else {}
    return _quantizers("learned", modifier, notes, fields)


def smoothquant(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    alpha = modifier.number("smoothing_strength", 0.5)
    if modifier.take("algorithm") == "log_equalization":
        notes.missing.append(f"{modifier.label}: log_equalization is not among hf_optim's techniques")
        modifier.drop("it belongs to the modifier", "mappings", "ignore", "num_calibration_steps")
        return []
    mappings = modifier.take("mappings")
    if mappings is not None and not isinstance(mappings, list):
        raise RecipeError(f"{modifier.label}: mappings must be a list, not {shown(mappings)}")
    if mappings and all(_smooths_a_norm(mapping) for mapping in mappings):
        notes.harmless.append(
            f"{modifier.label}: mappings (the norms and the layers that read them are found by tracing)"
        )
    elif mappings:
        modifier.change("mappings has no counterpart: the norms and the layers that read them are found by tracing")
    if ignore := modifier.names("ignore"):
        modifier.change(f"ignore names norms ({', '.join(map(one_line, ignore))}); skip of smoothquant names layers")
    modifier.drop("the calibration data says how much is read", "num_calibration_steps", "calibration_function")
    return [{**counterpart("smoothing"), "alpha": alpha}]


def spinquant(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    """R1 is the residual stream, R2 the values, R4 the inputs of down projections; R3 turns queries and keys."""
    modifier.drop("what is rotated is found by tracing", "mappings", "norm_mappings")
    kind, size = str(modifier.take("transform_type", "hadamard")), modifier.take("transform_block_size")
    modifier.drop("products are computed in float32 or wider", "precision")
    modifier.drop("signs are drawn by the seed of the step", "randomize", "transform_config")
    names = [name.upper() for name in modifier.names("rotations") or ["R1", "R2"]]
    if modifier.flag("learnable", False):
        modifier.change("learnable rotations: method learned of the step learns in another way")
    if kind not in ("hadamard", "random-hadamard"):
        modifier.change(f"transform_type {shown(kind)} has no counterpart: Hadamard matrices with random signs")
    if size is not None:
        modifier.change("transform_block_size has no counterpart: folded rotations mix all channels")
    if "R3" in names:
        notes.missing.append(f"{modifier.label}: R3 (rotated queries and keys) is not among hf_optim's techniques")
    where = [site for name, site in (("R1", "residual"), ("R2", "values")) if name in names]
    if not where:
        notes.missing.append(f"{modifier.label}: rotations without R1 and R2 have no step of their own")
        return []
    chosen: dict[str, Any] = {} if len(where) == 2 else {"where": where}
    return [{**counterpart("rotating"), **chosen, **({"online": True} if "R4" in names else {})}]


def _smooths_a_norm(mapping: Any) -> bool:
    """Return True if a mapping (layers, and what they read) smooths the output of a norm."""
    smooth = (
        mapping.get("smooth_layer") if isinstance(mapping, dict) else mapping[-1] if isinstance(mapping, list) else ""
    )
    return isinstance(smooth, str) and re.search(r"norm|ln_|ln$", smooth.lower()) is not None


def layers_of(modifier: Fields, targets: list[str], ignore: Sequence[str]) -> dict[str, Any]:
    """Return ``targets`` and ``skip`` of a step. The output head is left alone in hf_optim unless it is named."""
    skip = [name for name in ignore if name not in HEADS]
    if "Linear" in targets and len(skip) == len(ignore):
        modifier.change("it also takes the output head, which is left alone here unless targets names it")
    found: dict[str, Any] = {}
    if targets != ["Linear"]:
        found["targets"] = targets
    return {**found, **({"skip": skip} if skip else {})}
