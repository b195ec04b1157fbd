"""One mixture layer across ranks in one of several ways: tokens exchanged in chunks, or weights of experts gathered."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.exchange import all_gather_, reduce_scatter_, route_from
from ..distributed.grid import Grid, failures_named
from .capped_layer import layer_of
from .choices import Situation, Way
from .exchange import Compute, Pairs, combine, numbers_of, pair_up, run_experts


def share_counts(pairs: Pairs, grid: Grid, training: bool) -> tuple[Tensor, bool]:
    """Return int64 ``[G, E]`` on the host: pairs of each rank for each expert; and True if any rank needs gradients."""
    flag = torch.full((1,), int(training), dtype=pairs.counts.dtype, device=pairs.counts.device)
    mine = torch.cat([pairs.counts, flag])
    every = mine.new_empty(grid.size * len(mine))
    all_gather_(every, mine, grid.group)
    table = every.view(grid.size, -1).cpu()
    return table[:, :-1], bool(table[:, -1].any())


def by_rank(counts: Tensor, own: int) -> list[list[int]]:
    """Return how many pairs each rank has for each rank, from those for each expert ``[G, E]``."""
    return counts.view(len(counts), -1, own).sum(2).tolist()  # type: ignore[no-any-return]


def chunk_sizes(counts: Tensor, degree: int) -> Tensor:
    """Return int64 ``[degree, ...]``: counts divided as evenly as integers allow, without asking another rank."""
    ends = torch.stack([counts * (number + 1) // degree for number in range(degree)])
    return torch.diff(ends, dim=0, prepend=torch.zeros_like(ends[:1]))


def run_exchange(rows: Tensor, counts: Tensor, compute: Compute, own: int, grid: Grid, degree: int) -> Tensor:
    """Return the outputs for rows ``[P, d]``, sorted by expert: exchanged and computed in chunks that overlap.

    The pairs of each expert are divided among the chunks, so every rank knows the sizes of all. While one chunk is
    computed, the next one is on its way and the last one on its way back. ``counts`` as ``share_counts`` returns them.
    """
    sizes = chunk_sizes(counts, degree)  # [degree, G, E]
    mine = sizes[:, grid.rank]
    numbers = torch.arange(degree).repeat(counts.shape[1]).repeat_interleave(mine.t().reshape(-1))
    order = torch.argsort(numbers, stable=True).to(rows.device)
    rows = rows if degree == 1 else rows[order]
    routes = [route_from(by_rank(part, own), grid) for part in sizes]
    first = grid.rank * own
    coming = [route.start(part) for route, part in zip(routes, rows.split(mine.sum(1).tolist()), strict=True)]
    leaving = []
    for part, route, begun in zip(sizes, routes, coming, strict=True):
        local = numbers_of(part[:, first : first + own]).to(rows.device)
        leaving.append(route.start(run_experts(compute, route.finish(*begun), local), back=True))
    outputs = torch.cat([route.finish(*begun) for route, begun in zip(routes, leaving, strict=True)])
    if degree == 1:
        return outputs
    return outputs[torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))]


class _AllGather(torch.autograd.Function):
    """The parts of all ranks, one after the other; its backward sums the gradients that ranks have for each part."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        part = part.contiguous()
        whole = part.new_empty((grid.size * len(part), *part.shape[1:]))
        all_gather_(whole, part, grid.group)
        return whole

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        grid, grad = ctx.grid, grads[0].contiguous()
        own = len(grad) // grid.size
        if grad.device.type == "cuda":
            part = grad.new_empty((own, *grad.shape[1:]))
            reduce_scatter_(part, grad, grid.group)
            return part, None
        grad = grad.clone()
        with failures_named():
            dist.all_reduce(grad, group=grid.group)
        return grad[grid.rank * own : (grid.rank + 1) * own], None


def run_gathered(
    module: Any, hidden: Tensor, index: Tensor, weights: Tensor, own: int, grid: Grid, computed: int
) -> Tensor:
    """Return the output ``[T, d]`` of the tokens of this rank, which runs all experts with the weights of all ranks.

    ``computed``: how many pairs of its tokens an expert computes.
    """
    whole: Any = object.__new__(type(module))
    held = {name: value for name, value in vars(module).items() if name != "forward"}
    held["_parameters"] = {
        name: _AllGather.apply(value, grid) if value is not None and value.shape[:1] == (own,) else value
        for name, value in module._parameters.items()
    }
    held["num_experts"] = own * grid.size
    held["_is_expert_parallel"] = layer_of(module) is not None  # then the number of experts stands for "dropped"
    vars(whole).update(held)
    if computed:
        return type(module).forward(whole, hidden, index, weights)  # type: ignore[no-any-return]
    # Without a token of its own, a rank still takes part in the exchange of gradients.
    one = hidden.sum(dim=0, keepdim=True)
    none = type(module).forward(whole, one, index.new_zeros((1, 1)), weights.new_zeros((1, 1)))[:0]
    return hidden.new_zeros(hidden.shape) + none.sum(dim=0)


def run_adaptive(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """Return the output ``[T, d]`` of the tokens of this rank, in the way whose turn it is.

    ``layer`` has ``module``, ``experts_forward``, ``num_local_experts``, ``grids`` by order, and ``choices``.
    """
    own, flat = layer.num_local_experts, layer.grids["flat"]
    needs = torch.is_grad_enabled() and (hidden.requires_grad or _trains(layer.module))
    pairs = pair_up(index, own * flat.size)
    counts, training = share_counts(pairs, flat, needs)
    way, watch = layer.choices.turn(Situation.of(by_rank(counts, own), training), hidden.device)
    if watch is not None:
        hidden = watch.at_input(hidden)
    out = run_way(layer, way, pairs, counts, hidden, index, weights)
    return out if watch is None else watch.at_output(out)


def run_way(
    layer: Any, way: Way, pairs: Pairs, counts: Tensor, hidden: Tensor, index: Tensor, weights: Tensor
) -> Tensor:
    """Return the output in one way. All ways give the same result, up to the rounding of products of other sizes."""
    own = layer.num_local_experts
    if way.parallelism == "gather":
        return run_gathered(layer.module, hidden, index, weights, own, layer.grids["flat"], pairs.computed)
    grid = layer.grids[way.order]
    outputs = run_exchange(hidden[pairs.tokens], counts, layer.experts_forward, own, grid, way.degree)
    return combine(outputs, pairs, weights)


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
