r"""Scales of given codes by least squares, in the metric of a Hessian.

With the codes ``c`` of a group of columns ``a``, its zero point ``z`` and its scale ``s``, the output error
``tr((W - Q) H (W - Q)ᵀ)`` of a row is a parabola in ``s``. With ``b = c_a - z`` its minimum, all else fixed, is at::

    s + b · ((w - q) H)_a / (b H_aa bᵀ)

Groups are fitted one after the other (Gauss-Seidel), each with the new scales of those before it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from .grids import Grid
from .scales import storable_scale

# Rows processed at a time, where all at once would need several copies of the weight.
STRIP = 2048


@torch.no_grad()
def refit_scales(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, dtype: torch.dtype | None = None) -> Grid:
    """Return the grid with scales fitted to the codes; the output error of no row rises, beyond rounding errors.

    A scale is kept where the best one is not positive, or where rounding to ``dtype`` takes the gain away.

    Args:
        weight: ``[out, in]``, any float type.
        codes: ``[out, in]``, on ``grid``.
        grid: integer codes, per channel or per group of neighbouring columns. Zero points stay.
        hessian: ``[in, in]``, symmetric, positive semidefinite, any scale; its dtype is that of the computation.
        dtype: in which scales are stored; None for that of ``weight``.
    """
    parts = []
    for begin in range(0, len(weight), STRIP):
        rows = slice(begin, begin + STRIP)
        own = grid.rows(begin, begin + STRIP)
        parts.append(_refit(weight[rows].to(hessian.dtype), codes[rows], own, hessian, dtype or weight.dtype))
    return replace(grid, scale=torch.cat(parts).to(grid.scale.dtype))


def _refit(weight: Tensor, codes: Tensor, grid: Grid, hessian: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the scales of some rows, ``[out, groups]``, in the dtype of ``hessian``."""
    spec, scale = grid.spec, grid.scale.to(hessian.dtype)
    size = spec.group_size or weight.shape[1]
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.to(hessian.dtype)
    largest = torch.maximum(zero - spec.low, spec.high - zero)
    steps = codes.to(hessian.dtype).unflatten(1, (-1, size)) - zero.unsqueeze(-1)
    gradient = (weight - (steps * scale.unsqueeze(-1)).flatten(1)) @ hessian
    fitted = scale.clone()
    for group in range(scale.shape[1]):
        columns, own = slice(group * size, (group + 1) * size), steps[:, group]
        curvature = ((own @ hessian[columns, columns]) * own).sum(1)
        slope = (own * gradient[:, columns]).sum(1)
        best = (scale[:, group] + slope / curvature).to(grid.scale.dtype)
        usable = torch.isfinite(best) & (best > 0)
        best = storable_scale(torch.where(usable, best, 1.0), dtype, largest[:, group]).to(hessian.dtype)
        change = best - scale[:, group]
        gains = usable & (change * (change * curvature - 2 * slope) < 0)
        change = torch.where(gains, change, 0.0)
        fitted[:, group] = torch.where(gains, best, fitted[:, group])
        gradient[:, columns.stop :] -= (change.unsqueeze(1) * own) @ hessian[columns, columns.stop :]
    return fitted
