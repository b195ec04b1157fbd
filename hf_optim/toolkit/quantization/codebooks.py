r"""One codebook for a tensor, as GOBO makes it: what is no outlier goes to the nearest of a few centroids (2005.03842).

With mean m and standard deviation s of the weights, a weight is an outlier where the logarithm of its density under the
normal distribution of the two is low (section IV)::

    log p(w) = -(w - m)^2 / (2 s^2) - log(s sqrt(2 pi)) < threshold

The others are sorted into 2^b bins of equal population, whose means are the first centroids. Then, as long as the sum
of the distances ``sum |w - c(w)|`` falls: every weight goes to the nearest centroid, every centroid to the mean of its
weights. In one dimension the weights of a centroid are neighbours in sorted order, so that after one sort and one
running sum an iteration takes ``O(2^b log n)``.
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
        history: the sum of distances of the first centroids and of every better set after them; it falls strictly.
    """

    centroids: Tensor
    history: tuple[float, ...]


def outlier_mask(weight: Tensor, threshold: float, kept: Tensor | None = None) -> Tensor:
    """Where the log density of a weight, under the normal distribution of all, is below ``threshold``: bool, its shape.

    The density is that of the weight as it is, in 1 / unit of the weight, so the threshold cuts at another multiple of
    the deviation in another layer: -4 at 3.6 deviations for one of 0.04, at 3.9 for 0.01.

    Args:
        kept: bool, the shape of ``weight``; what is not kept (pruned) counts for nothing and is no outlier.
    """
    wide = weight.detach().float()
    counted = wide if kept is None else wide[kept]
    if counted.numel() < 2:
        return torch.zeros_like(wide, dtype=torch.bool)
    spread, mean = torch.std_mean(counted.double(), correction=0)
    if not spread > 0:
        return torch.zeros_like(wide, dtype=torch.bool)
    reach = -2.0 * (threshold + float(spread.log()) + 0.5 * math.log(2 * math.pi))
    distance = (wide - mean.float()).abs()
    found = distance > float(spread) * math.sqrt(reach) if reach > 0 else torch.ones_like(wide, dtype=torch.bool)
    return found if kept is None else found & kept


@torch.no_grad()
def fit_codebook(values: Tensor, levels: int, iterations: int = 100, pinned: float | None = None) -> Codebook:
    """Centroids of ``values``, iterated until the sum of distances falls no more; the best set is returned.

    Args:
        values: floating, any shape, finite, at least one.
        levels: how many centroids, ``pinned`` among them.
        iterations: at most so many.
        pinned: a centroid that stays where it is, such as 0 for weights that were pruned.
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
    """The index of the nearest centroid (of two, the lower) of each value: uint8, the shape of ``values``.

    Args:
        centroids: ``[levels]``, ascending, at most 256.
    """
    wide = centroids.double()
    middles = (wide[1:] + wide[:-1]) / 2
    flat = values.detach().reshape(-1)
    codes = torch.empty(flat.numel(), dtype=torch.uint8, device=flat.device)
    # In parts: indices are eight times as large as codes.
    for part, out in zip(flat.split(1 << 22), codes.split(1 << 22), strict=True):
        out.copy_(torch.bucketize(part.double(), middles))
    return codes.view(values.shape)


def _bounds(ordered: Tensor, centroids: Tensor) -> Tensor:
    """Where in sorted order the weights of each centroid begin, and the end: int64 ``[levels + 1]``."""
    inner = torch.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, right=True)
    return torch.cat([inner.new_zeros(1), inner, inner.new_tensor([len(ordered)])])


def _means(ordered: Tensor, sums: Tensor, bounds: Tensor, otherwise: Tensor) -> Tensor:
    """The mean of each bin; an empty one has that of ``otherwise``."""
    count = bounds.diff()
    return torch.where(count > 0, sums[bounds].diff() / count.clamp(min=1), otherwise)


def _distance(ordered: Tensor, sums: Tensor, bounds: Tensor, centroids: Tensor) -> float:
    """The sum of the distances of all values to the centroids of their bins."""
    first, last = bounds[:-1], bounds[1:]
    middle = torch.searchsorted(ordered, centroids, right=True).clamp(first, last)
    below = centroids * (middle - first) - (sums[middle] - sums[first])
    above = (sums[last] - sums[middle]) - centroids * (last - middle)
    return float((below + above).sum())
