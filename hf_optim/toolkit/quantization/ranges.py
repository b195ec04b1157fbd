"""Ranges of activations by channel, and groups of channels that share a range.

A group of channels with the ranges ``[l_j, h_j]`` has the range ``[min l_j, max h_j]``. Rounding to its grid adds noise
to each of its channels, with a variance proportional to the square of the width of that range::

    noise = sum_g  n_g (max_g h_j - min_g l_j)^2

``optimal_groups`` minimizes this sum over all partitions of the channels into a number of intervals.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics.observers import InputObserver
from .grids import GridSpec, qparams_from_range

MAX_BINS = 1024  # channels, or slices of channels, between which intervals may be cut
ASYMMETRIC_INT8 = GridSpec(8, "int", "tensor", None, symmetric=False)


class ChannelMinMax(InputObserver[tuple[Tensor, Tensor]]):
    """Observer of the range of inputs per channel: name -> (minimum, maximum), float32 ``[channels]`` each."""

    def update(self, name: str, inputs: Tensor) -> None:
        low, high = (end.float() for end in torch.aminmax(inputs.reshape(-1, inputs.shape[-1]), dim=0))
        self.check_finite(name, low + high)
        if name in self.found:
            low, high = torch.minimum(low, self.found[name][0]), torch.maximum(high, self.found[name][1])
        self.found[name] = (low, high)


def even_groups(channels: int, groups: int) -> Tensor:
    """Divide the channels into intervals whose sizes differ by at most one: int64 ``[channels]``, the group of each.

    There are never more groups than channels.
    """
    groups = min(groups, channels)
    return torch.arange(channels) * groups // channels


def optimal_groups(low: Tensor, high: Tensor, groups: int) -> Tensor:
    """Divide the channels into the intervals with the least noise, by dynamic programming: ``[channels]`` int64.

    Above ``MAX_BINS`` channels, intervals are cut only between ``MAX_BINS`` even slices.

    Args:
        low, high: ``[channels]``, the ranges in the order in which channels may share a group.
        groups: upper limit on the number of intervals.
    """
    bins = even_groups(low.numel(), MAX_BINS)
    count = int(bins[-1]) + 1
    lows = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, bins, low.double().cpu(), "amin")
    highs = torch.zeros(count, dtype=torch.float64).scatter_reduce(0, bins, high.double().cpu(), "amax")
    ends = torch.bincount(bins).cumsum(0).double()
    size = ends[None] - torch.cat([ends.new_zeros(1), ends[:-1]])[:, None]
    widths = _interval_widths(lows, highs)
    cost = torch.where(size > 0, size * widths.square(), torch.inf)  # [first, last]
    best = cost[0]
    starts = []
    for _ in range(1, min(groups, count)):
        # The last group begins at ``first``; the channels before it are divided into one group less.
        total = cost.clone()
        total[1:] += best[:-1, None]
        best, begin = total.min(dim=0)
        starts.append(begin)
    group = torch.zeros(count, dtype=torch.int64)
    last = count - 1
    for begin in reversed(starts):
        first = int(begin[last])
        group[first:] += int(first > 0)
        if first == 0:
            break
        last = first - 1
    return group[bins]


def _interval_widths(low: Tensor, high: Tensor) -> Tensor:
    """Return the width of the range of the channels ``first`` to ``last``, ``[n, n]``; every range includes 0."""
    n = low.numel()
    above = torch.ones(n, n).triu().bool()
    lows = torch.where(above, low.clamp_max(0.0).expand(n, n), torch.inf).cummin(dim=1).values
    highs = torch.where(above, high.clamp_min(0.0).expand(n, n), -torch.inf).cummax(dim=1).values
    return torch.where(above, highs - lows, 0.0)


def group_qparams(low: Tensor, high: Tensor, group: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute scale and int8 zero point of an asymmetric 8-bit grid for each group, ``[groups]`` each.

    Args:
        low, high: ``[channels]``, float32.
        group: ``[channels]`` int64, numbered from 0 without gaps.
        dtype: in which the scales will be stored.
    """
    count, group = int(group.max()) + 1, group.to(low.device)
    lows = torch.zeros(count, dtype=low.dtype, device=low.device).scatter_reduce(0, group, low, "amin")
    highs = torch.zeros(count, dtype=low.dtype, device=low.device).scatter_reduce(0, group, high, "amax")
    scale, zero = qparams_from_range(lows, highs, ASYMMETRIC_INT8, dtype)
    assert zero is not None
    return scale, zero


def quantize_dequantize(x: Tensor, scale: Tensor, zero: Tensor, group: Tensor | None = None) -> Tensor:
    """Round ``x`` to an 8-bit grid and back, in its dtype.

    Args:
        x: ``[..., channels]``.
        scale, zero: ``[groups]``; without ``group`` they broadcast over ``x``.
        group: int64 ``[channels]``, the group of each channel, or None.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    scale, zero = scale.to(wide), zero.to(wide)
    if group is not None:
        scale, zero = scale[group.to(x.device)], zero[group.to(x.device)]
    return (((torch.round(wide / scale) + zero).clamp(-128, 127) - zero) * scale).to(x.dtype)
