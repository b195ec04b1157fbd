r"""Bit allocation: a width for every layer, within a budget of bytes.

Minimise ``Σ_i cost_i(b_i)`` subject to ``Σ_i bytes_i(b_i) <= limit``, a multiple-choice knapsack. It is solved exactly:
layer by layer, all Pareto-optimal pairs (bytes, cost) are kept. Layers of a transformer have few distinct shapes, so
there are few distinct sums of bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

# Above this number of pairs, those of nearly equal bytes are merged into the cheaper one: close to the optimum, and
# never over the limit.
MAX_PAIRS = 200_000


def row_bytes(columns: int, bits: int) -> int:
    """Return the bytes of a row of codes, packed without gaps into 32-bit words as compressed-tensors does."""
    return 4 * -(-columns * bits // 32)


def stored_bytes(rows: int, columns: int, bits: float, scales: int = 1, width: int = 4) -> int:
    """Return the bytes of a symmetrically quantized weight ``[rows, columns]`` in a checkpoint.

    Args:
        rows, columns: the shape of the weight.
        bits: width of a code; a fraction interpolates linearly between the two nearest integers.
        scales: number of scales per row.
        width: bytes of a scale.
    """
    below, above = row_bytes(columns, math.floor(bits)), row_bytes(columns, math.ceil(bits))
    return int(rows * (below + (bits - math.floor(bits)) * (above - below) + scales * width))


def allocate_bits(
    costs: Mapping[str, Mapping[int, float]], sizes: Mapping[str, Mapping[int, int]], limit: int
) -> dict[str, int]:
    """Choose the widths with the smallest sum of costs that fit.

    Args:
        costs: layer name -> bits -> cost, >= 0.
        sizes: layer name -> bits -> bytes, for the same layers and bits.
        limit: budget in bytes.

    Returns:
        layer name -> bits; for equal costs, the assignment with the fewest bytes.

    Raises:
        ValueError: even the smallest widths do not fit.
    """
    total, cost = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    history: list[tuple[torch.Tensor, torch.Tensor]] = []
    for name, reserved in zip(costs, _min_bytes_after(sizes), strict=True):
        bits = sorted(costs[name])
        total = torch.cat([total + sizes[name][b] for b in bits])
        new = torch.cat([cost + costs[name][b] for b in bits])
        origin = torch.arange(len(cost)).repeat(len(bits))
        choice = torch.tensor(bits).repeat_interleave(len(cost))
        kept = _pareto_front(total, new, limit - reserved)
        if not len(kept):
            raise ValueError(f"{limit} bytes do not hold the smallest widths, which take {_min_bytes(sizes)}")
        total, cost = total[kept], new[kept]
        history.append((origin[kept], choice[kept]))
    plan: dict[str, int] = {}
    at = int(cost.argmin())
    for name, (origin, choice) in zip(reversed(list(costs)), reversed(history), strict=True):
        plan[name] = int(choice[at])
        at = int(origin[at])
    return {name: plan[name] for name in costs}


def allocate_bits_by_rank(
    ranks: Mapping[str, float], choices: Sequence[int], sizes: Mapping[str, Mapping[int, int]], limit: int
) -> dict[str, int]:
    """Choose widths by rank alone: a higher rank never gets fewer bits.

    All layers start with the fewest bits. In descending order of rank they get the next width, until one does not fit;
    once all have it, the next pass raises them to the width after it.

    Args:
        ranks: layer name -> sensitivity.
        choices: the widths.
        sizes: layer name -> bits -> bytes.
        limit: budget in bytes.

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


def _pareto_front(total: torch.Tensor, cost: torch.Tensor, most: int) -> torch.Tensor:
    """Return the indices of the Pareto-optimal pairs of at most ``most`` bytes, in ascending order of bytes."""
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
        # Costs fall with bytes, so the last pair of a bucket is its cheapest. The very first pair is the smallest.
        last = torch.cat([bucket[1:] != bucket[:-1], torch.ones(1, dtype=torch.bool)])
        last[0] = True
        order = order[last]
    return order


def _min_bytes_after(sizes: Mapping[str, Mapping[int, int]]) -> list[int]:
    """Return the fewest bytes that the layers after each layer take."""
    least = [min(own.values()) for own in sizes.values()]
    return [sum(least[i + 1 :]) for i in range(len(least))]


def _min_bytes(sizes: Mapping[str, Mapping[int, int]]) -> int:
    return sum(min(own.values()) for own in sizes.values())
