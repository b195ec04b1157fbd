"""The numbers that pruning reports, recomputed for the conformance suite (``Technique.recompute``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hf_optim.toolkit import topology


def rounds(case: Any, step: Any) -> dict[str, Any]:
    """Return the sparsity after each round, up to that of the checkpoint: equal shares, in whole weights of a layer."""
    sizes = [case.weight(case.before, name).numel() for name in case.names]
    sizes = sizes if step.scope == "layer" else [sum(sizes)]
    shares = [1 - (1 - step.sparsity) ** (number / step.rounds) for number in range(1, step.rounds + 1)]
    removed = [sum(int(size * share + 0.5) for size in sizes) for share in shares]
    found = case.zeros()
    done = removed.index(sum(zeros for _, zeros in found["counted"].values())) + 1
    return {"rounds": done, "sparsities": [count / sum(sizes) for count in removed[:done]], **found}


def closed_gates(case: Any, on: str) -> float:
    """Return the share of the gates that are closed: of weights, or of units all of whose columns are zero."""
    if on == "weights":
        return case.zeros()["sparsity"]
    units = [u for u in topology.find_prunable_groups(topology.trace(case.before)) if u.kind == on]
    closed = [
        bool((case.weight(case.after, unit.consumer)[:, columns] == 0).all())
        for unit in units
        for columns in unit.columns
    ]
    return sum(closed) / len(closed)


def structured(case: Any) -> dict[str, Any]:
    """Return sizes, widths and depths of both models, from their parameters and their blocks."""
    before, after = case.before, case.after
    old_blocks, new_blocks = ({b.name: b for b in topology.blocks(model)} for model in (before, after))
    removed = sorted(set(old_blocks) - {_origin(block, old_blocks) for block in new_blocks.values()})
    old, new = (_widths(model) for model in (before, after))
    lists = dict.fromkeys(block.list_name for block in old_blocks.values())
    return {
        "parameters_before": sum(parameter.numel() for parameter in before.parameters()),
        "parameters_after": sum(parameter.numel() for parameter in after.parameters()),
        "widths": {kind: [[old[kind], new[kind]]] for kind in old if old[kind] != new[kind]},
        "layers": {n: [len(m.get_submodule(n)) for m in (before, after)] for n in lists} if removed else {},
        "removed_layers": removed,
    }


def _origin(block: Any, known: dict[str, Any]) -> str:
    """Return the block of the original model with the same vectors, which pruning of units does not change."""

    def vectors(module: nn.Module) -> list[torch.Tensor]:
        return [p for p in module.parameters() if p.dim() == 1]

    def same(other: Any) -> bool:
        pairs = zip(vectors(block.module), vectors(other.module), strict=True)
        return all(a.shape != b.shape or torch.equal(a, b) for a, b in pairs)

    return next(name for name, other in known.items() if same(other))


def _widths(model: nn.Module) -> dict[str, int]:
    """Return the number of units in a layer, by kind; all layers of these models have equally many."""
    return {units.kind: len(units) for units in topology.find_prunable_groups(topology.trace(model))}
