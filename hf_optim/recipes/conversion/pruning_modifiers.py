"""Modifiers of llm-compressor that prune, as steps."""

from __future__ import annotations

import re
from typing import Any

from ...errors import RecipeError
from ...trust.bounds import shown
from ..traits import SPARSE
from .counterparts import Steps, adds, counterpart
from .notes import Fields, Notes
from .quantizing_modifiers import HEADS, layers_of

# A name or pattern that ends in the number of a block: the linear layers inside are meant.
_BLOCK = re.compile(r"(\.\d+|\\d\+)\$?$")


def sparsegpt(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    damp = modifier.number("dampening_frac", 0.01)
    modifier.drop("weights are refitted all at once", "block_size")
    preserve = modifier.flag("preserve_sparsity_mask", False)
    if not preserve and any(adds(step, SPARSE) for step in before):
        modifier.change("preserve_sparsity_mask: false; here the zeros of an earlier step stay")
    step = {**counterpart("sparsegpt"), **({"damp": damp} if damp != 0.01 else {})}
    return _one_shot(step, None, modifier, notes)


def wanda(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    return _one_shot(counterpart("wanda"), counterpart("wanda_unstructured"), modifier, notes)


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
    layers = layers_of(modifier, [_inside_block(name) for name in targets], ignore)
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


def magnitude(modifier: Fields, notes: Notes, before: Steps) -> Steps:
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
    layers = layers_of(
        modifier, ["Linear" if name in ("__ALL_PRUNABLE__", "__ALL__") else name for name in targets], HEADS
    )
    if begin is None or end is None or end <= begin:
        return [{**counterpart("at_once"), "sparsity": final, **scope, **layers}]
    modifier.change(
        f"start: {begin}, end: {end} and update: {every} are epochs, and were left out: gmp's begin, end and every are "
        "optimizer steps, or shares of the training"
    )
    return [{**counterpart("ramp"), "sparsity": final, "initial": initial, **scope, **layers}]


def constant(modifier: Fields, notes: Notes, before: Steps) -> Steps:
    modifier.drop("masks hold from their step on", "start", "end", "update", "targets")
    if any(adds(step, SPARSE) for step in before):
        notes.harmless.append(f"{modifier.label} (hf_optim keeps the zeros of every pruning step in later training)")
    else:
        notes.missing.append(f"{modifier.label}: zeros that the checkpoint already has are not made into masks")
    return []
