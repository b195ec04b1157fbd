"""The role of every weight of a model: a partition, so that what a step leaves alone and what it changes add up."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ..modules.replace import find_submodule
from .layer_coverage import Item, covered_items
from .roles import Role, roles
from .towers import is_pooler, is_projector

TOKEN_EMBEDDINGS = "token embeddings"
POSITION_EMBEDDINGS = "position embeddings"
PATCH_EMBEDDING = "patch embedding"
CONVOLUTIONS = "convolutions"
IN_BLOCKS = "layers of the blocks"
EXPERTS = "experts"
OTHER = "other matrices"
VECTORS = "norms, biases and other vectors"
TIED_HEAD = f"{Role.OUTPUT_HEAD}: its weight is that of the token embeddings"

_BY_NAME = "outside the blocks; a pattern of its names in targets includes it"
_TABLE = "a table of vectors; its name in targets includes it where the technique takes embeddings"
REASONS: Mapping[str, str] = {
    Role.ROUTER: "a small change sends tokens to other experts; only its exact name in targets includes it",
    Role.SHARED_EXPERT_GATE: "it weighs a whole expert; only its exact name in targets includes it",
    Role.OUTPUT_HEAD: "its errors are those of the output; only its exact name in targets includes it",
    Role.VISION_TOWER: "Linear means the language model; a pattern of its names in targets includes it",
    Role.AUDIO_TOWER: "Linear means the language model; a pattern of its names in targets includes it",
    Role.PROJECTOR: _BY_NAME,
    Role.POOLER: _BY_NAME,
    Role.OUTSIDE_BLOCKS: _BY_NAME,
    TOKEN_EMBEDDINGS: _TABLE,
    POSITION_EMBEDDINGS: "they are added to the inputs",
    PATCH_EMBEDDING: "a convolution, not a linear layer",
    CONVOLUTIONS: "not linear layers",
    IN_BLOCKS: "targets and skip leave them out",
    EXPERTS: "this step works on linear layers, and these are stacked matrices",
    OTHER: "not linear layers",
    VECTORS: "not matrices",
}
"""Role -> why a step that works on linear layers leaves it alone. Other steps leave out what their coverage says."""

_CONVOLUTION = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class LeftAlone:
    """Weights with one role that a step does not change.

    Attributes:
        reason: why.
        names: the modules, or parameters without a module of their own.
        weights: number of weights.
        is_own_reason: the step gave the reason.
    """

    reason: str
    names: tuple[str, ...]
    weights: int
    is_own_reason: bool = False


def weights_left_alone(
    model: nn.Module,
    covered: Iterable[str],
    known: Mapping[str, str] | None = None,
    skipped: Mapping[str, Iterable[str]] | None = None,
) -> dict[str, LeftAlone]:
    """Return the weights that ``covered`` does not include, by role; with the covered ones they are all of the model.

    Args:
        model: the model, whose tied weights count once.
        covered: names of modules or parameters (see ``coverage``).
        known: module -> role, as it was before the model was changed; None finds the roles of the model.
        skipped: reason -> names of modules that a step left out for it; such modules have roles of their own.
    """
    found = dict(known) if known else {name: str(role) for name, role in roles(model).items()}
    why = {name: reason for reason, names in (skipped or {}).items() for name in names}
    reasons: dict[str, str] = {}
    left: dict[str, list[Item]] = {}
    for item, is_covered in covered_items(model, covered):
        if is_covered:
            continue
        role, reason = _role(model, item, found), ""
        if role == Role.OUTPUT_HEAD and _is_table(model, item):
            role, reasons[TIED_HEAD] = TIED_HEAD, REASONS[Role.OUTPUT_HEAD]
        if role in (IN_BLOCKS, EXPERTS) or role in set(Role):
            reason = next((text for name in _owners(item) for text in [_reason_for(name, why)] if text), "")
        if reason and reason not in set(Role):
            role = f"{role}: {reason}"
        reasons[role] = reason or reasons.get(role) or REASONS[role]
        left.setdefault(role, []).append(item)
    order = {role: number for number, role in enumerate(REASONS)}
    return {
        role: LeftAlone(
            reasons[role],
            tuple(dict.fromkeys(name for item in items for name in _shown(item))),
            sum(item.weights for item in items),
            role not in REASONS and role != TIED_HEAD,
        )
        for role, items in sorted(left.items(), key=lambda each: order[each[0].partition(":")[0]])
    }


def _reason_for(name: str, why: Mapping[str, str]) -> str:
    """Return why a module, or one around it, was left out; ``""`` if it was not."""
    while name:
        if name in why:
            return why[name]
        name = name.rpartition(".")[0]
    return ""


def _owners(item: Item) -> list[str]:
    """Return the modules, and matrices of experts, that a weight belongs to, under every name."""
    return list(dict.fromkeys(name.removesuffix(".weight") for name in item.names))


def _shown(item: Item) -> list[str]:
    """Return the names of a weight for the record: its own for a matrix of an expert, all of a tied weight."""
    owners = _owners(item)
    return owners[-1:] if not item.linear and item.matrix and ".experts." in owners[-1] else owners


def _is_table(model: nn.Module, item: Item) -> bool:
    return any(isinstance(_owner(model, name), nn.Embedding) for name in item.names)


def _role(model: nn.Module, item: Item, found: Mapping[str, str]) -> str:
    for name in _owners(item):
        if name in found:
            return found[name]
    name = item.names[0]
    modules = [_owner(model, each) for each in item.names]
    if _is_table(model, item):
        return POSITION_EMBEDDINGS if _is_position(name) else TOKEN_EMBEDDINGS
    if not item.matrix:
        return VECTORS
    if item.linear:
        return IN_BLOCKS if item.in_block else str(Role.OUTSIDE_BLOCKS)
    owner = modules[0]
    if isinstance(owner, _CONVOLUTION):
        return PATCH_EMBEDDING if not item.in_block and "patch" in name.lower() else CONVOLUTIONS
    if any(module is None for module in modules) or "expert" in f"{name} {type(owner).__name__}".lower():
        return EXPERTS
    if _is_position(name):
        return POSITION_EMBEDDINGS
    if not item.in_block and is_pooler(model, name):
        return str(Role.POOLER)
    if not item.in_block and is_projector(model, name):
        return str(Role.PROJECTOR)
    return VECTORS if item.is_vector else OTHER


def _owner(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module that a parameter belongs to; None for the name of a matrix of an expert."""
    return find_submodule(model, name.rpartition(".")[0])


def _is_position(name: str) -> bool:
    return bool(re.search(r"position|pos_emb|\bwpe\b|relative_attention_bias|pos_embed", name.lower()))
