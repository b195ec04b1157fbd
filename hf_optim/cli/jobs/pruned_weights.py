"""Which weights the pruning steps of a recipe work on in a model without weights: linear layers and experts."""

from __future__ import annotations

from typing import Any

from ...compressed.storability import takes_embeddings
from ...recipes.config import OptimConfig
from ...recipes.technique import Technique
from ...recipes.traits import SPARSE
from ...runs.coverage import patterns_of
from ...runs.scope import Scope
from ...toolkit import topology
from ...toolkit.pruning import masks, nm_groups, sparsity


def pruned_weights(recipe: OptimConfig, model: Any) -> dict[str, dict[str, Any]]:
    """Return what each step that makes weights sparse chooses them from, by the label of the step.

    Steps behind one that changes the architecture are left out. An entry has JSON types: ``layers`` (linear layers and
    embeddings), ``expert_matrices``, their ``weights``, the ``share`` of all weights of the model, and ``text``.
    """
    found: dict[str, dict[str, Any]] = {}
    total = sum(parameter.numel() for parameter in model.parameters())
    for position, step in enumerate(recipe.steps):
        if step.changes_architecture():
            break
        if SPARSE in step.contract().adds and getattr(step, "on", "weights") == "weights":
            found[f"step {position + 1} ({step.name})"] = _entry(step, model, total)
    return found


def _entry(step: Technique, model: Any, total: int) -> dict[str, Any]:
    targets, skip = patterns_of(step) or ((), ())
    selected = Scope("", model, model).select(targets, skip, experts=True, embeddings=takes_embeddings(step))
    layers = {name: selected[name] for name in masks.weight_names(selected) if step.takes(selected[name])}
    if (group := getattr(step, "group", None)) is not None:
        layers, _ = nm_groups.select_divisible(layers, group)
    experts = sum(isinstance(layer, topology.ExpertLinear) for layer in layers.values())
    weights = sum(layer.weight.numel() for layer in layers.values())
    share = weights / total if total else 0.0
    phrase = sparsity.layers_phrase(len(layers) - experts, experts)
    left = "; experts stay as they are" if topology.has_experts(model) and not experts else ""
    return {
        "layers": len(layers) - experts,
        "expert_matrices": experts,
        "weights": weights,
        "share": round(share, 6),
        "text": f"weights of {phrase}, which are {100 * share:.1f} % of all{left}",
    }
