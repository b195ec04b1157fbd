"""The product of a mixture layer in buffers of fixed size, one for each expert: shapes that do not depend on the load.

Rows of an expert that no token fills are zero, and computed. Every shape follows from the capacities, and nothing waits
for the host, so the product can be captured as a CUDA graph. All experts are two grouped products on the kernels, whose
groups are the buffers; where the kernels do not compute a layer, each expert is two products of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import kernels
from .plan import ranks_among_equals


class Rooms(NamedTuple):
    """The buffers of all experts, made before a capture, since this copies from the host.

    Attributes:
        capacities: rows of each expert.
        sizes: the same, int64 ``[E + 1]``, with a 0 for "computed by none".
        op: the operators of the kernels that compute the layer, or None.
        route: of the kernels: which rows are whose.
        block: rows of a block of the route.
    """

    capacities: tuple[int, ...]
    sizes: Tensor
    op: Any = None
    route: Any = None
    block: int = 0


def rooms_of(module: Any, capacities: Sequence[int], hidden: Tensor, weights: Tensor) -> Rooms:
    """Return the buffers of ``capacities`` rows for the experts of a module. hidden ``[T, d]``, weights ``[T, k]``."""
    device, total = hidden.device, sum(capacities)
    sizes = torch.tensor([*capacities, 0], device=device)
    op = kernels.operators(module, hidden, weights) if total else None
    if op is None:
        return Rooms(tuple(capacities), sizes)
    owners = torch.arange(len(capacities), device=device).repeat_interleave(sizes[:-1], output_size=total)
    block = op.block_rows(total, len(capacities))
    return Rooms(tuple(capacities), sizes, op, op.find_route(owners.unsqueeze(1), len(capacities), block), block)


def bucketed_product(
    module: Any, hidden: Tensor, experts: Tensor, weights: Tensor, rooms: Rooms
) -> tuple[Tensor, Tensor]:
    """Return the output of a mixture layer whose experts have the room of ``rooms``, and the loads.

    The output is right if no load exceeds its capacity; pairs without room are left out of it.

    Args:
        module: experts in the layout of transformers' experts interface.
        hidden: ``[T, d]``.
        experts: int64 ``[T, k]``; numbers from the module's number of experts on stand for "computed by none".
        weights: ``[T, k]``.
        rooms: ``rooms_of(module, capacities, hidden, weights)``. An expert without room is not read.

    Returns:
        ``[T, d]`` of the dtype of ``hidden``, and int64 ``[E]``: the pairs of each expert.
    """
    count, device, total = len(rooms.capacities), hidden.device, sum(rooms.capacities)
    tokens, top_k = experts.shape
    starts = torch.cumsum(rooms.sizes, 0) - rooms.sizes
    numbers = experts.reshape(-1).clamp(max=count)
    slots = ranks_among_equals(numbers)
    loads = torch.zeros(count + 1, dtype=torch.int64, device=device)
    loads = loads.scatter_add(0, numbers, torch.ones_like(numbers))[:count]
    # Pairs without room take the place behind all buffers, whose row is zero.
    fits = slots < rooms.sizes[numbers]
    places = torch.where(fits, starts[numbers] + slots, total)
    sources = torch.full((total + 1,), tokens, dtype=torch.int64, device=device)
    sources = sources.scatter(0, places, torch.arange(tokens * top_k, device=device) // top_k)
    rows = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])[sources[:total]]
    if rooms.op is not None:
        out = kernels.rows_of_experts(rooms.op, module, rows, rooms.route, rooms.block)
        computed = torch.where(fits.view_as(experts), experts, count)
        pairs = out[places.clamp(max=total - 1)]
        return rooms.op.combine(pairs, computed, weights, count, hidden.dtype), loads
    parts, first = [], 0
    for expert, size in enumerate(rooms.capacities):
        if size:
            parts.append(_one_expert(module, expert, rows[first : first + size]))
        first += size
    out = torch.cat([*parts, hidden.new_zeros(1, hidden.shape[1])])
    pairs = out[places].view(tokens, top_k, out.shape[1]) * weights.unsqueeze(-1)
    return pairs.sum(dim=1).to(hidden.dtype), loads


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
