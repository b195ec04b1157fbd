"""The dropped shares of a capacity, recomputed token by token for the conformance suite."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit import experts


def recompute(case: Any, routing: experts.Routing, measured: bool) -> dict[str, Any]:
    """Return what a step reports, from forwards of the checkpoint with the capacity in its ``config.json``."""
    model = case.after
    counts: dict[str, Tensor] = {}
    seen: dict[str, int] = defaultdict(int)
    stored = experts.stored_routing(model.config)
    assert stored == routing, "config.json has other settings than the step"
    names = experts.attach_routing(model, routing)

    def count(module: nn.Module, args: tuple[Tensor, Tensor, Tensor], name: str) -> None:
        rows = len(next(iter(case.batches[seen[name]].values()))) if routing.group == "sequence" else 1
        seen[name] += 1
        found = count_dropped(args[1], args[2].float(), module.num_experts, rows, routing)  # type: ignore[arg-type]
        counts[name] = counts.get(name, 0) + found

    handles = [
        model.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: count(m, args, name))
        for name in names
    ]
    try:
        case.outputs(model)
    finally:
        for handle in handles:
            handle.remove()
        experts.detach_routing(model)
    if not measured:
        return {"layers": len(names)}
    chosen, dropped = (sum(part[i].sum() for part in counts.values()) for i in (0, 1))
    return {
        "layers": len(names),
        "dropped": float(dropped / chosen),
        "dropped_by_layer": {name: float(part[1].sum() / part[0].sum()) for name, part in counts.items()},
        "dropped_by_expert": {name: (part[1] / part[0].clamp(min=1)).tolist() for name, part in counts.items()},
    }


def merit(gates: list[float], priority: str) -> float:
    """Return the priority of a token."""
    return {"position": 0.0, "top1": max(gates), "sum": sum(gates)}[priority]


def count_dropped(chosen: Tensor, gates: Tensor, num_experts: int, rows: int, routing: experts.Routing) -> Tensor:
    """Give out slots one after the other, in evaluation mode and without padding.

    Args:
        chosen, gates: ``[T, k]``, the tokens of ``rows`` sequences that compete among themselves.
        num_experts: E.
        rows: the number of groups.
        routing: the settings.

    Returns:
        float64 ``[2, E]``: how many tokens chose each expert, and how many of them it dropped.
    """
    found = torch.zeros(2, num_experts, dtype=torch.float64)
    for ids, weights in zip(chosen.chunk(rows), gates.chunk(rows), strict=True):
        tokens, top_k = ids.shape
        limit = int(experts.capacity(routing.rounding, routing.capacity, torch.tensor(tokens), top_k, num_experts))
        limit = tokens if tokens < routing.dropless_below else max(limit, routing.min_slots)
        merits = [merit(gates_of_token, routing.priority) for gates_of_token in weights.tolist()]
        order = sorted(range(tokens), key=merits.__getitem__, reverse=True)  # stable, also in reverse
        ranked = weights.argsort(dim=1, descending=True, stable=True).tolist()
        used = [0] * num_experts
        for choice in range(top_k):
            for token in order:
                expert = int(ids[token, ranked[token][choice]])
                found[0, expert] += 1
                found[1, expert] += used[expert] >= limit
                used[expert] += 1
    return found
