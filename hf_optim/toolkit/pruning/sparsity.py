"""Sparsity of the layers of a model: metrics for the record, table rows for the card."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ..distributed.fsdp import FullWeights
from ..topology.experts import ExpertLinear, expert_linears

# Layer name -> weights and zeros.
Counted = Mapping[str, Sequence[int]]
TABLE_HEADER = ["layers", "count", "weights", "zeros", "smallest", "largest"]


def count_zeros(model: nn.Module, names: Iterable[str]) -> Counted:
    """Count weights and zeros: layer name -> ``[weights, zeros]``, sorted by name.

    Sharded weights (FSDP2) are gathered: all ranks must call this.
    """
    counted = {}
    views = expert_linears(model)
    names = sorted(names)
    for name, weight in FullWeights(model, [f"{name}.weight" for name in names if name not in views]).items():
        counted[name.removesuffix(".weight")] = [weight.numel(), weight.numel() - int(weight.count_nonzero())]
    # Each stack of experts is gathered once.
    stacks: dict[str, list[ExpertLinear]] = {}
    for view in (views[name] for name in names if name in views):
        stacks.setdefault(view.parameter_name, []).append(view)
    for parameter, weight in FullWeights(model, stacks).items():
        for view in stacks[parameter]:
            counted[view.name] = [weight[0].numel(), weight[0].numel() - int(weight[view.index].count_nonzero())]
    return counted


def overall(counted: Counted) -> float:
    """Return the share of zeros over all counted layers; 0 without layers."""
    weights = sum(size for size, _ in counted.values())
    return sum(zeros for _, zeros in counted.values()) / weights if weights else 0.0


def metrics(model: nn.Module, names: Iterable[str]) -> dict[str, object]:
    """Return the sparsity of layers for the record, in JSON types; shares are rounded to six decimals.

    Returns ``{"sparsity": share of zeros, "layers": {name: share}, "counted": {name: [weights, zeros]}}``. If some of
    the layers are matrices of experts, ``"expert_matrices"`` counts them and ``"linear_layers"`` the others.
    """
    counted = count_zeros(model, names)
    layers = {name: round(zeros / size, 6) for name, (size, zeros) in counted.items()}
    experts = len(expert_linears(model).keys() & counted.keys())
    found = {"sparsity": round(overall(counted), 6), "layers": layers, "counted": counted}
    return {**found, "expert_matrices": experts, "linear_layers": len(counted) - experts} if experts else found


def layers_phrase(linear: int, experts: int = 0) -> str:
    """Return how many linear layers and matrices of experts there are, as ``"8 linear layers"``."""
    parts = [f"{linear} linear layer{'s' * (linear != 1)}"] if linear or not experts else []
    parts += [f"{experts} {'matrix' if experts == 1 else 'matrices'} of experts"] if experts else []
    return " and ".join(parts)


def counted_phrase(reported: Mapping[str, Any]) -> str:
    """Return the layers of an entry of the record (``metrics``) in words."""
    return layers_phrase(reported.get("linear_layers", len(reported["layers"])), reported.get("expert_matrices", 0))


def table_rows(counted: Counted) -> list[list[str]]:
    """Return the rows below ``TABLE_HEADER``. Layers whose names differ only in the block index share a row."""
    groups: dict[str, list[Sequence[int]]] = {}
    for layer, count in counted.items():
        groups.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", layer), []).append(count)
    rows = []
    for name, counts in groups.items():
        size = sum(weights for weights, _ in counts)
        shares = [zeros / weights for weights, zeros in counts]
        parts = [sum(zeros for _, zeros in counts) / size, min(shares), max(shares)]
        rows.append([name, str(len(counts)), f"{size:,}", *(f"{100 * part:.1f} %" for part in parts)])
    return rows
