r"""Codebook of a tensor, as in GOBO: weights that are not outliers become the nearest of a few centroids (2005.03842).

With the mean m and the standard deviation s of the weights, a weight is an outlier if its log density under the normal
distribution of m and s is low (section IV)::

    log p(w) = -(w - m)^2 / (2 s^2) - log(s sqrt(2 pi)) < threshold

The other weights are sorted into 2^b bins of equal population, whose means are the initial centroids. Then two steps
repeat as long as the sum of distances ``sum |w - c(w)|`` falls: assign every weight to the nearest centroid, and move
every centroid to the mean of its weights. In one dimension the weights of a centroid are contiguous in sorted order, so
that after one sort and one cumulative sum an iteration takes ``O(2^b log n)``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Codebook:
    """The centroids of a tensor.

    Attributes:
        centroids: float64 ``[levels]``, ascending.
        history: the sum of distances of the initial centroids and of every better set after them; strictly decreasing.
    """

    centroids: Tensor
    history: tuple[float, ...]


def outlier_mask(weight: Tensor, threshold: float, kept: Tensor | None = None) -> Tensor:
    """Return where the log density of a weight, under the normal distribution of all, is below ``threshold``.

    The density is that of the unscaled weight, in 1 / unit of the weight, so the same threshold cuts at different
    multiples of the standard deviation: -4 cuts at 3.6 deviations for a deviation of 0.04, and at 3.9 for 0.01.

    Args:
        weight: floating, any shape.
        threshold: log density below which a weight is an outlier.
        kept: bool, the shape of ``weight``; weights that are not kept (pruned) are left out and are not outliers.

    Returns:
        bool, the shape of ``weight``.
    """
    wide = weight.detach().float()
    counted = wide if kept is None else wide[kept]
    if counted.numel() < 2:
        return torch.zeros_like(wide, dtype=torch.bool)
    std, mean = torch.std_mean(counted.double(), correction=0)
    if not std > 0:
        return torch.zeros_like(wide, dtype=torch.bool)
    squared = -2.0 * (threshold + float(std.log()) + 0.5 * math.log(2 * math.pi))  # of the cut, in deviations
    distance = (wide - mean.float()).abs()
    found = distance > float(std) * math.sqrt(squared) if squared > 0 else torch.ones_like(wide, dtype=torch.bool)
    return found if kept is None else found & kept


@torch.no_grad()
def fit_codebook(values: Tensor, levels: int, iterations: int = 100, pinned: float | None = None) -> Codebook:
    """Fit centroids to ``values`` until the sum of distances no longer falls, and return the best set.

    Args:
        values: floating, any shape, finite, at least one.
        levels: number of centroids, including ``pinned``.
        iterations: upper limit.
        pinned: a centroid that does not move, such as 0 for pruned weights.
    """
    ordered = values.detach().float().flatten().sort().values.double()
    sums = torch.cat([ordered.new_zeros(1), ordered.cumsum(0)])
    free = levels - (pinned is not None)
    bounds = (torch.arange(free + 1, device=ordered.device) * len(ordered)).div(free, rounding_mode="floor")
    centroids = _means(ordered, sums, bounds, ordered[bounds[:-1].clamp(max=len(ordered) - 1)])
    fixed = torch.zeros(levels, dtype=torch.bool, device=ordered.device)
    if pinned is not None:
        at = int(torch.searchsorted(centroids, torch.tensor(pinned, dtype=torch.float64, device=ordered.device)))
        centroids = torch.cat([centroids[:at], centroids.new_tensor([pinned]), centroids[at:]])
        fixed[at] = True
    bounds = _bounds(ordered, centroids)
    history = [_distance(ordered, sums, bounds, centroids)]
    for _ in range(iterations):
        tried = torch.where(fixed, centroids, _means(ordered, sums, bounds, centroids))
        bounds = _bounds(ordered, tried)
        distance = _distance(ordered, sums, bounds, tried)
        if not distance < history[-1]:
            break
        centroids = tried
        history.append(distance)
    return Codebook(centroids, tuple(history))


def nearest_centroids(values: Tensor, centroids: Tensor) -> Tensor:
    """Return the index of the centroid nearest to each value (of two, the lower): uint8, the shape of ``values``.

    Args:
        values: floating, any shape.
        centroids: ``[levels]``, ascending, at most 256.
    """
    wide = centroids.double()
    midpoints = (wide[1:] + wide[:-1]) / 2
    flat = values.detach().reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    # In parts, because the int64 indices are eight times as large as the codes.
    for part, out in zip(flat.split(1 << 22), codes.split(1 << 22), strict=True):
        out.copy_(torch.bucketize(part.double(), midpoints))
    return codes.view(values.shape)


def _bounds(ordered: Tensor, centroids: Tensor) -> Tensor:
    """Return where the weights of each centroid begin in sorted order, and the end: int64 ``[levels + 1]``."""
    inner = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])


def _means(ordered: Tensor, sums: Tensor, bounds: Tensor, default: Tensor) -> Tensor:
    """Return the mean of each bin; ``default`` for an empty one."""
    count = bounds.diff()
    return torch.where(count > 0, sums[bounds].diff() / count.clamp(min=1), default)


def _distance(ordered: Tensor, sums: Tensor, bounds: Tensor, centroids: Tensor) -> float:
    """Return the sum of the distances of all values to the centroids of their bins."""
    first, last = bounds[:-1], bounds[1:]
    split = torch.searchsorted(ordered, centroids, right=True).clamp(first, last)
    below = centroids * (split - first) - (sums[split] - sums[first])
    above = (sums[last] - sums[split]) - centroids * (last - split)
    return float((below + above).sum())
