"""Bounds on the scales that are folded into weights, so that both sides stay representable in their dtypes.

Dividing by a scale can push a gain below the precision of its dtype, and multiplying can push a weight above its
largest number: 1e5 is not a float16, and a gain of 1 divided by it is a subnormal one. The bounds always contain 1, at
which nothing changes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..topology.layer_pairs import LinearPair
from ..topology.linear_layers import weight_out_in
from ..topology.norm_groups import NormGroup
from .folding import max_over_columns

# Room that is left below the largest number of a dtype, for inputs beyond those of the calibration data.
HEADROOM = 8.0
# Multiples of the smallest normal number (of eps, for gains stored with an offset) above which a divided value stays.
PRECISION = 32.0


@torch.no_grad()
def bound_norm_scale(group: NormGroup, scale: Tensor, input_peak: Tensor | None = None) -> Tensor:
    """Clamp the scale of a norm group for ``folding.move_norm_scale_``.

    Args:
        group: the norm and the linear layers that read it.
        scale: ``[d]``, positive.
        input_peak: ``[d]``, the largest magnitude of the norm's output; None does not bound activations.

    Returns:
        The shape and dtype of ``scale``. With it the gain and bias of the norm and the columns of the linear layers
        are finite, and keep their precision.
    """
    module: Any = group.module
    gain = (module.weight.double() + group.offset).abs()
    if getattr(module, "bias", None) is not None:
        gain = torch.maximum(gain, module.bias.double().abs())
    info = torch.finfo(module.weight.dtype)
    # A gain stored as its distance from ``offset`` has the absolute precision of numbers near ``offset``.
    least = PRECISION * (abs(group.offset) * info.eps if group.offset else info.smallest_normal)
    columns = _column_peak(group.linears.values()).to(gain.device)
    dtypes = {weight_out_in(linear).dtype for linear in group.linears.values()}
    return _bounded(scale, gain, info.max, least, columns, dtypes, input_peak)


@torch.no_grad()
def bound_pair_scale(pair: LinearPair, scale: Tensor, input_peak: Tensor | None = None) -> Tensor:
    """Clamp the scale of a pair of linear layers for ``folding.move_pair_scale_``: ``[K]``, as ``bound_norm_scale``.

    ``input_peak`` ``[K]`` is the largest magnitude of the consumer's input, over the columns that read each row.
    """
    producer: Any = pair.producer_module
    weight = weight_out_in(producer)
    rows = pair.rows.to(weight.device)
    peak = weight[rows].abs().amax(1).double()
    if producer.bias is not None:
        peak = torch.maximum(peak, producer.bias[rows].double().abs())
    info = torch.finfo(weight.dtype)
    columns = max_over_columns(pair, _column_peak([pair.consumer_module])).to(peak.device)
    least = PRECISION * info.smallest_normal
    return _bounded(scale, peak, info.max, least, columns, {weight_out_in(pair.consumer_module).dtype}, input_peak)


def _bounded(
    scale: Tensor,
    divided: Tensor,
    divided_max: float,
    divided_least: float,
    multiplied: Tensor,
    dtypes: Iterable[torch.dtype],
    input_peak: Tensor | None,
) -> Tensor:
    """Clamp ``scale`` so that ``divided / scale`` and ``multiplied * scale`` stay in their ranges."""
    infos = [torch.finfo(dtype) for dtype in dtypes]
    largest, least = min(info.max for info in infos), max(info.smallest_normal for info in infos) * PRECISION
    high = torch.minimum(divided / divided_least, largest / HEADROOM / multiplied)
    low = torch.maximum(divided * HEADROOM / divided_max, least / multiplied)
    if input_peak is not None:
        low = torch.maximum(low, input_peak.to(low) * HEADROOM / largest)
    bounded = torch.minimum(torch.maximum(scale.to(low), low.clamp(max=1)), high.clamp(min=1))
    return bounded.to(scale)


def _column_peak(modules: Iterable[Any]) -> Tensor:
    """Return the largest magnitude of each column over linear layers: float64 ``[in]``."""
    return torch.stack([weight_out_in(module).abs().amax(0).double() for module in modules]).amax(0)
