"""The product of a mixture layer in buffers of fixed size, one for each expert: shapes that do not depend on the load.

Rows of an expert that no token fills are zero, and computed. Every shape follows from the capacities, and nothing waits
for the host, so the product can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .plan import ranks_among_equals


def bucketed_product(
    module: Any,
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    capacities: Sequence[int],
    room: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output of a mixture layer whose experts have room for ``capacities`` tokens, and the loads.

    The output is right if no load exceeds its capacity; pairs without room are left out of it.

    Args:
        module: experts in the layout of transformers' experts interface.
        hidden: ``[T, d]``.
        experts: int64 ``[T, k]``; numbers from the module's number of experts on stand for "computed by none".
        weights: ``[T, k]``.
        capacities: for each expert; an expert without room is not read.
        room: ``room_of(capacities)``, which must be made before a capture: it copies from the host.

    Returns:
        ``[T, d]`` of the dtype of ``hidden``, and int64 ``[E]``: the pairs of each expert.
    """
    count, device = len(capacities), hidden.device
    tokens, top_k = experts.shape
    room = room_of(capacities, device) if room is None else room
    starts = torch.cumsum(room, 0) - room
    total = sum(capacities)
    numbers = experts.reshape(-1).clamp(max=count)
    slots = ranks_among_equals(numbers)
    loads = torch.zeros(count + 1, dtype=torch.int64, device=device)
    loads = loads.scatter_add(0, numbers, torch.ones_like(numbers))[:count]
    # Pairs without room take the place behind all buffers, whose row is zero.
    places = torch.where(slots < room[numbers], starts[numbers] + slots, total)
    sources = torch.full((total + 1,), tokens, dtype=torch.int64, device=device)
    sources = sources.scatter(0, places, torch.arange(tokens * top_k, device=device) // top_k)
    rows = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])[sources[:total]]
    parts, first = [], 0
    for expert, size in enumerate(capacities):
        if size:
            parts.append(_one_expert(module, expert, rows[first : first + size]))
        first += size
    out = torch.cat([*parts, hidden.new_zeros(1, hidden.shape[1])])
    pairs = out[places].view(tokens, top_k, out.shape[1]) * weights.unsqueeze(-1)
    return pairs.sum(dim=1).to(hidden.dtype), loads


def room_of(capacities: Sequence[int], device: torch.device) -> Tensor:
    """Return the capacities as a tensor, int64 ``[E + 1]``, with a 0 for "computed by none"."""
    return torch.tensor([*capacities, 0], device=device)


def _one_expert(own: Any, expert: int, rows: Tensor) -> Tensor:
    """Return the output of one expert for its rows."""
    up = own.gate_up_proj if own.has_gate else own.up_proj
    up_bias = (own.gate_up_proj_bias if own.has_gate else own.up_proj_bias) if own.has_bias else None
    inner = _linear(rows, up[expert], None if up_bias is None else up_bias[expert], own.is_transposed)
    inner = own._apply_gate(inner) if own.has_gate else own.act_fn(inner)
    bias = own.down_proj_bias[expert] if own.has_bias else None
    out = _linear(inner, own.down_proj[expert], bias, own.is_transposed)
    return own.post_expert_norm(out) if getattr(own, "has_post_expert_norm", False) else out


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return torch.nn.functional.linear(rows.to(weight.dtype), weight.t() if transposed else weight, bias)
