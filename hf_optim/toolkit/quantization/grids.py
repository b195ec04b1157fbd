"""Quantization grids: integers of 2 to 8 bits and float8, their scales and zero points, and rounding to them.

A value on a grid is ``(code - zero_point) * scale``. Codes are whole numbers in ``[-2^(bits-1), 2^(bits-1) - 1]``, or
float8 (e4m3) numbers. Zero is always on the grid: it has the code ``zero_point``, 0 where the grid is symmetric.

Scales have the shapes of compressed-tensors: ``[1]`` per tensor, ``[out, 1]`` per channel, ``[out, groups]`` per group
of neighbouring inputs, ``[..., 1]`` per token. Rounding is done in float32 (float64 for float64 weights), half to even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

Strategy = Literal["tensor", "channel", "group", "token"]
FLOAT8 = torch.float8_e4m3fn
# Shares of the full range that the MSE search tries, from the largest.
RANGE_SHARES = tuple(1.0 - 0.01 * step for step in range(76))


@dataclass(frozen=True)
class GridSpec:
    """What kind of grid.

    Attributes:
        bits: of the codes, 2 to 8; 8 for float.
        type: ``"int"`` or ``"float"`` (e4m3).
        strategy: which values share a scale.
        group_size: inputs in a group, a divisor of the width; for the strategy ``group`` only.
        symmetric: no zero point. Float grids are symmetric.
    """

    bits: int = 8
    type: Literal["int", "float"] = "int"
    strategy: Strategy = "channel"
    group_size: int | None = None
    symmetric: bool = True

    @property
    def low(self) -> float:
        """The smallest code."""
        return torch.finfo(FLOAT8).min if self.type == "float" else float(-(2 ** (self.bits - 1)))

    @property
    def high(self) -> float:
        """The largest code."""
        return torch.finfo(FLOAT8).max if self.type == "float" else float(2 ** (self.bits - 1) - 1)


@dataclass(frozen=True)
class Grid:
    """A grid for one tensor.

    Attributes:
        spec: its kind.
        scale: step between neighbours, positive; float32, or float64 for float64 values.
        zero_point: whole numbers of the codes' range as int8, in the shape of ``scale``; None where symmetric.
    """

    spec: GridSpec
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """The codes of the nearest grid points: int8, or float8 for float grids; shape of ``values``."""
        parts = self._split(values.to(self.scale.dtype))
        scale, zero = self._sides(parts)
        return round_codes(parts, scale, zero, self.spec).reshape(values.shape).to(self.code_dtype)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """The values of codes, in the dtype of ``scale``."""
        parts = self._split(codes.to(self.scale.dtype))
        scale, zero = self._sides(parts)
        return ((parts - zero) * scale).reshape(codes.shape)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """``values`` moved to the nearest grid points, in the dtype of ``scale``."""
        return self.dequantize(self.quantize(values))

    def rows(self, begin: int, end: int) -> Grid:
        """The grid of the output channels ``begin`` to ``end`` (strategies ``channel`` and ``group``)."""
        zero = None if self.zero_point is None else self.zero_point[begin:end]
        return replace(self, scale=self.scale[begin:end], zero_point=zero)

    @property
    def code_dtype(self) -> torch.dtype:
        return FLOAT8 if self.spec.type == "float" else torch.int8

    def _split(self, values: torch.Tensor) -> torch.Tensor:
        return group_by_scale(values, self.spec)

    def _sides(self, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero point, ready to be broadcast over ``parts``."""
        shape = (*parts.shape[:-1], 1)
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.to(self.scale.dtype)
        return self.scale.reshape(shape), zero.reshape(shape)


def round_codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, spec: GridSpec) -> torch.Tensor:
    """Codes of ``values`` for scales and zero points that broadcast over them, as floating-point numbers."""
    scaled = (values / scale + zero).clamp(spec.low, spec.high)
    return scaled.to(FLOAT8).to(values.dtype) if spec.type == "float" else scaled.round()


def group_by_scale(values: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """``values`` with one more dimension, so that what shares a scale is the last one.

    ``[out, groups, group_size]`` per group, ``[..., 1, in]`` per channel or token, ``[1, numel]`` per tensor.
    """
    if spec.strategy == "tensor":
        return values.reshape(1, -1)
    if spec.strategy == "group":
        assert spec.group_size is not None
        return values.unflatten(-1, (-1, spec.group_size))
    return values.unsqueeze(-2)


def fit_group_size(in_features: int, asked: int) -> int:
    """The largest divisor of ``in_features`` that is at most ``asked``."""
    return next(size for size in range(min(asked, in_features), 0, -1) if in_features % size == 0)


def qparams_from_range(
    low: torch.Tensor, high: torch.Tensor, spec: GridSpec, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scale and zero point that cover the range ``[low, high]``, widened to hold zero.

    Symmetric: ``max(-low, high)`` over half the range of codes, so that the largest value lies half a step beyond the
    largest code. Asymmetric: ``(high - low)`` over the range of codes.

    Args:
        low, high: ends of the range, in any shape; the results have it too.
        spec: the kind of grid.
        dtype: in which the scale will be stored; it is rounded to it.

    Returns:
        The scale, exact in ``dtype``, as the dtype of ``low``; the zero point as int8, None where symmetric.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    reach = spec.high - spec.low
    scale = torch.maximum(-low, high) / (reach / 2) if spec.symmetric else (high - low) / reach
    scale = scale.to(dtype).to(low.dtype)
    # A range of nothing, or one too small for the dtype: any step will do, and its code is the zero point.
    scale = torch.where(scale == 0, torch.finfo(dtype).eps, scale)
    if spec.symmetric:
        return scale, None
    return scale, (spec.low - low / scale).round().clamp(spec.low, spec.high).to(torch.int8)


def make_grid(
    values: torch.Tensor,
    spec: GridSpec,
    observer: Literal["minmax", "mse"] = "minmax",
    dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
) -> Grid:
    """The grid of a tensor, from the smallest and largest of the values that share a scale.

    Args:
        values: ``[out, in]`` (any shape per tensor or token).
        spec: the kind of grid.
        observer: ``"minmax"`` covers the whole range; ``"mse"`` tries shares of it (``RANGE_SHARES``) and keeps, for each
            scale, the one with the least sum of squared errors.
        dtype: in which scales will be stored; None for that of ``values``.
        importance: ``[in]``, weight of each input channel in the sum of squared errors; None for all alike.
    """
    dtype = dtype or values.dtype
    parts = group_by_scale(values.to(torch.float64 if values.dtype == torch.float64 else torch.float32), spec)
    low, high = torch.aminmax(parts, dim=-1)
    scale, zero = qparams_from_range(low, high, spec, dtype)
    if observer == "mse":
        weights = None if importance is None else group_by_scale(importance.to(parts).expand(values.shape), spec)
        scale, zero = _search(parts, low, high, spec, dtype, weights)
    shape = parts.shape[:-1]
    return Grid(spec, scale.reshape(shape), None if zero is None else zero.reshape(shape))


def _search(
    parts: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    weights: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    best: torch.Tensor | None = None
    # There is one more negative code than positive ones: the first candidate has the largest value on the largest code.
    full = (spec.high - spec.low) / 2 / spec.high if spec.symmetric else 1.0
    for share in (full, *RANGE_SHARES) if full > 1 else RANGE_SHARES:
        scale, zero = qparams_from_range(low * share, high * share, spec, dtype)
        offset = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        step, shift = scale.unsqueeze(-1), offset.unsqueeze(-1)
        error = ((round_codes(parts, step, shift, spec) - shift) * step - parts).square_()
        total = (error if weights is None else error.mul_(weights)).sum(-1)
        if best is None:
            best, chosen, chosen_zero = total, scale, zero
            continue
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scale, chosen)
        chosen_zero = zero if chosen_zero is None else torch.where(better, zero, chosen_zero)  # type: ignore[arg-type]
    return chosen, chosen_zero
