r"""Bits for each layer within a number of bytes: choosing one of a few widths for every layer.

Minimise ``Σ_i cost_i(b_i)`` subject to ``Σ_i bytes_i(b_i) <= limit``, a multiple-choice knapsack. It is solved exactly:
layer after layer, all pairs (bytes, cost) that no other pair beats in both are kept. Layers of a transformer have few
shapes, so few sums of bytes differ.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

# With more pairs than this, neighbours in bytes are merged, the cheaper one stays: near the optimum, never over it.
MAX_PAIRS = 200_000


def row_bytes(columns: int, bits: int) -> int:
    """Bytes of a row of codes, packed without gaps into 32-bit words as compressed-tensors does."""
    return 4 * -(-columns * bits // 32)


def stored_bytes(rows: int, columns: int, bits: float, scales: int = 1, width: int = 4) -> int:
    """Bytes of a symmetrically quantized weight ``[rows, columns]`` in a checkpoint.

    Args:
        rows, columns: of the weight.
        bits: of a code; a fraction lies in proportion between the two widths beside it.
        scales: per row.
        width: bytes of a scale.
    """
    below, above = row_bytes(columns, math.floor(bits)), row_bytes(columns, math.ceil(bits))
    return int(rows * (below + (bits - math.floor(bits)) * (above - below) + scales * width))


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], limit: int
) -> dict[str, int]:
    """The widths with the least sum of costs that fit.

    Args:
        costs: layer name -> bits -> cost, >= 0.
        sizes: layer name -> bits -> bytes, for the same layers and bits.
        limit: most bytes in all.

    Returns:
        layer name -> bits; of equal costs the fewest bytes.

    Raises:
        ValueError: even the smallest widths do not fit.
    """
    total, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    came: list[tuple[torch.Tensor, torch.Tensor]] = []
    rest = _least_after(sizes)
    for name, room in zip(costs, rest, strict=True):
        bits = sorted(costs[name])
        total = torch.cat([total + sizes[name][b] for b in bits])
        new = torch.cat([cost + costs[name][b] for b in bits])
        origin = torch.arange(len(cost)).repeat(len(bits))
        choice = torch.tensor(bits).repeat_interleave(len(cost))
        kept = _undominated(total, new, limit - room)
        if not len(kept):
            raise ValueError(f"{limit} bytes do not hold the smallest widths, which take {_least(sizes)}")
        total, cost = total[kept], new[kept]
        came.append((origin[kept], choice[kept]))
    plan: dict[str, int] = {}
    at = int(cost.argmin())
    for name, (origin, choice) in zip(reversed(list(costs)), reversed(came), strict=True):
        plan[name] = int(choice[at])
        at = int(origin[at])
    return {name: plan[name] for name in costs}


def allocate_bits_by_rank(
    ranks: Mapping[str, float], choices: Sequence[int], sizes: Mapping[str, Mapping[int, int]], limit: int
) -> dict[str, int]:
    """Widths by rank alone: never fewer bits for a higher rank.

    All layers begin with the fewest bits. From the highest rank down they get the next width until one does not fit;
    when all have it, the round begins again with the width after it.

    Args:
        ranks: layer name -> how much it needs bits.
        choices: the widths.
        sizes: layer name -> bits -> bytes.
        limit: most bytes in all.

    Raises:
        ValueError: even the smallest widths do not fit.
    """
    widths = sorted(choices)
    plan = dict.fromkeys(ranks, widths[0])
    used = sum(sizes[name][widths[0]] for name in plan)
    if used > limit:
        raise ValueError(f"{limit} bytes do not hold the smallest widths, which take {used}")
    order = sorted(ranks, key=lambda name: ranks[name], reverse=True)
    for low, high in pairwise(widths):
        for name in order:
            more = sizes[name][high] - sizes[name][low]
            if used + more > limit:
                return plan
            used += more
            plan[name] = high
    return plan


def _undominated(total: torch.Tensor, cost: torch.Tensor, most: int) -> torch.Tensor:
    """Indices of the pairs within ``most`` that no pair beats in bytes and cost, by ascending bytes."""
    by_cost = cost.argsort(stable=True)
    order = by_cost[total[by_cost].argsort(stable=True)]
    order = order[total[order] <= most]
    if not len(order):
        return order
    best = cost[order].cummin(0).values
    before = torch.cat([torch.full_like(best[:1], torch.inf), best[:-1]])
    order = order[cost[order] < before]
    if len(order) > MAX_PAIRS:
        span = int(total[order[-1]] - total[order[0]]) + 1
        bucket = (total[order] - total[order[0]]) * MAX_PAIRS // span
        # Costs fall with bytes: the last pair of a bucket is its cheapest; the very first one is the smallest.
        last = torch.cat([bucket[1:] != bucket[:-1], torch.ones(1, dtype=torch.bool)])
        last[0] = True
        order = order[last]
    return order


def _least_after(sizes: Mapping[str, Mapping[int, int]]) -> list[int]:
    """For each layer the fewest bytes that those after it take."""
    least = [min(own.values()) for own in sizes.values()]
    return [sum(least[i + 1 :]) for i in range(len(least))]


def _least(sizes: Mapping[str, Mapping[int, int]]) -> int:
    return sum(min(own.values()) for own in sizes.values())
