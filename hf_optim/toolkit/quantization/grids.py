"""Quantization grids: integers of 2 to 8 bits, float8 and 4-bit floats, their scales and zero points, and rounding.

A value on a grid is ``(code - zero_point) * scale``. Codes are whole numbers in ``[-2^(bits-1), 2^(bits-1) - 1]``,
float8 (e4m3) numbers, or 4-bit floats doubled (``float4``), which are whole numbers, too. Zero is always on the grid,
with the code ``zero_point``, which is 0 if the grid is symmetric.

Scales have the shapes of compressed-tensors: ``[1]`` per tensor, ``[out, 1]`` per channel, ``[out, groups]`` per group
of adjacent inputs, ``[..., 1]`` per token. Rounding is done in float32 (float64 for float64 weights), half to even.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import Literal

import torch

from . import float4
from .scales import storable_scale

Strategy = Literal["tensor", "channel", "group", "token"]
FLOAT8 = torch.float8_e4m3fn
# Shares of the full range that the MSE search tries, in descending order.
RANGE_SHARES = tuple(1.0 - 0.01 * number for number in range(76))


@dataclass(frozen=True)
class GridSpec:
    """The kind of a grid, without its scales.

    Attributes:
        bits: width of the codes, 2 to 8; 8 for float, 4 for 4-bit floats.
        type: ``"int"``, ``"float"`` (e4m3), or the 4-bit floats ``"nvfp4"`` and ``"mxfp4"`` (``float4``).
        strategy: which values share a scale.
        group_size: inputs per group, a divisor of the input width; only for the strategy ``group``.
        symmetric: True if there is no zero point. Float grids are symmetric.
        global_scale: the float32 number that the scales of an NVFP4 tensor share; None until ``fitted``.
    """

    bits: int = 8
    type: Literal["int", "float", "nvfp4", "mxfp4"] = "int"
    strategy: Strategy = "channel"
    group_size: int | None = None
    symmetric: bool = True
    global_scale: float | None = None

    @property
    def is_float4(self) -> bool:
        """Return True for 4-bit floats, whose codes are not evenly spaced."""
        return self.type in float4.GROUPS

    def fitted(self, values: torch.Tensor) -> GridSpec:
        """Return the spec with what all scales of a tensor share: of NVFP4, ``global_scale``; of others, nothing.

        Parts of a tensor that are quantized apart need the spec of the whole. Raises ``NumericalError`` for 4-bit
        floats of values that are not finite.
        """
        if not self.is_float4 or self.global_scale is not None:
            return self
        found = float4.global_scale(values)
        return replace(self, global_scale=found) if self.type == "nvfp4" else self

    @property
    def low(self) -> float:
        """Return the smallest code."""
        if self.is_float4:
            return -float4.LARGEST
        return torch.finfo(FLOAT8).min if self.type == "float" else float(-(2 ** (self.bits - 1)))

    @property
    def high(self) -> float:
        """Return the largest code."""
        if self.is_float4:
            return float4.LARGEST
        return torch.finfo(FLOAT8).max if self.type == "float" else float(2 ** (self.bits - 1) - 1)


@dataclass(frozen=True)
class Grid:
    """The grid of one tensor.

    Attributes:
        spec: its kind.
        scale: distance between adjacent grid points; float32, or float64 for float64 values. Negative where the extra
            code of a symmetric grid, ``-2^(bits-1)``, stands for a positive value (``signed_scale``).
        zero_point: int8 codes in the shape of ``scale``; None if symmetric.
    """

    spec: GridSpec
    scale: torch.Tensor
    zero_point: torch.Tensor | None = None

    def quantize(self, values: torch.Tensor) -> torch.Tensor:
        """Return the codes of the nearest grid points: int8, or float8 for float8 grids; the shape of ``values``."""
        parts = group_by_scale(values.to(self.scale.dtype), self.spec)
        scale, zero = self.scale_and_zero(parts)
        return round_codes(parts, scale, zero, self.spec).reshape(values.shape).to(self.code_dtype)

    def dequantize(self, codes: torch.Tensor) -> torch.Tensor:
        """Return the values of codes, in the dtype of ``scale``."""
        parts = group_by_scale(codes.to(self.scale.dtype), self.spec)
        scale, zero = self.scale_and_zero(parts)
        return ((parts - zero) * scale).reshape(codes.shape)

    def nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the grid points nearest to ``values``, in the dtype of ``scale``."""
        return self.dequantize(self.quantize(values))

    def rows(self, begin: int, end: int) -> Grid:
        """Return the grid of the output channels ``begin`` to ``end`` (strategies ``channel`` and ``group``)."""
        zero = None if self.zero_point is None else self.zero_point[begin:end]
        return replace(self, scale=self.scale[begin:end], zero_point=zero)

    @property
    def global_scale(self) -> torch.Tensor | None:
        """Return the number that all scales of an NVFP4 tensor share, float32 ``[1]``; None for other grids."""
        found = self.spec.global_scale
        return None if found is None else torch.tensor([found], dtype=torch.float32, device=self.scale.device)

    @property
    def code_dtype(self) -> torch.dtype:
        """Return the dtype of the codes."""
        return FLOAT8 if self.spec.type == "float" else torch.int8

    def scale_and_zero(self, parts: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return scale and zero point in a shape that broadcasts over ``parts``."""
        shape = (*parts.shape[:-1], 1)
        zero = torch.zeros_like(self.scale) if self.zero_point is None else self.zero_point.to(self.scale.dtype)
        return self.scale.reshape(shape), zero.reshape(shape)


def round_codes(values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | float, spec: GridSpec) -> torch.Tensor:
    """Return the codes of ``values``, as floating-point numbers; ``scale`` and ``zero`` broadcast over ``values``."""
    return nearest_codes(values / scale + zero, spec)


def nearest_codes(scaled: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Return the nearest codes to ``value / scale + zero_point``, in its dtype."""
    scaled = scaled.clamp(spec.low, spec.high)
    if spec.is_float4:
        return float4.round_doubled(scaled)
    return scaled.to(FLOAT8).to(scaled.dtype) if spec.type == "float" else scaled.round()


def code_step(scaled: torch.Tensor, spec: GridSpec) -> torch.Tensor | float:
    """Return the distance between the codes on both sides of ``value / scale + zero_point``; 1 for integers."""
    return float4.step_of(scaled.detach()) if spec.is_float4 else 1.0


def stored_scale(
    scale: torch.Tensor, spec: GridSpec, dtype: torch.dtype, largest_code: torch.Tensor | float
) -> torch.Tensor:
    """Round scales to those that the format of a grid stores: ``dtype``, or of 4-bit floats its own.

    Args:
        scale: the exact scales, not negative.
        spec: the kind of grid; ``fitted`` if it is NVFP4.
        dtype, largest_code: see ``storable_scale``.
    """
    if spec.type == "nvfp4":
        assert spec.global_scale is not None
        return float4.nvfp4_scale(scale, spec.global_scale)
    return float4.mxfp4_scale(scale) if spec.type == "mxfp4" else storable_scale(scale, dtype, largest_code)


def group_by_scale(values: torch.Tensor, spec: GridSpec) -> torch.Tensor:
    """Add a dimension to ``values``, so that the values along the last one share a scale.

    ``[out, groups, group_size]`` per group, ``[..., 1, in]`` per channel or token, ``[1, numel]`` per tensor.
    """
    if spec.strategy == "tensor":
        return values.reshape(1, -1)
    if spec.strategy == "group":
        assert spec.group_size is not None
        return values.unflatten(-1, (-1, spec.group_size))
    return values.unsqueeze(-2)


def fit_group_size(in_features: int, requested: int) -> int:
    """Return the largest divisor of ``in_features`` that is at most ``requested``."""
    return next(size for size in range(min(requested, in_features), 0, -1) if in_features % size == 0)


def qparams_from_range(
    low: torch.Tensor, high: torch.Tensor, spec: GridSpec, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute the scale and the zero point that cover the range ``[low, high]``, widened to include zero.

    Symmetric: ``max(-low, high)`` over half the range of codes, so that the largest value lies half a scale beyond the
    largest code. Asymmetric: ``(high - low)`` over the range of codes.

    Args:
        low, high: ends of the range, of any shape, which is that of the results.
        spec: the kind of grid.
        dtype: in which the scale will be stored.

    Returns:
        The scale in the dtype of ``low``, as ``storable_scale`` rounds it; the zero point as int8, None if symmetric.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    half_range = (spec.high - spec.low) / 2
    if spec.symmetric:
        return stored_scale(torch.maximum(-low, high) / half_range, spec, dtype, -spec.low), None
    # By halves, since the width of the range may exceed the largest number.
    scale = storable_scale((high / 2 - low / 2) / half_range, dtype, 1.0)
    zero = (spec.low - low / scale).round().clamp(spec.low, spec.high)
    return storable_scale(scale, dtype, torch.maximum(zero - spec.low, spec.high - zero)), zero.to(torch.int8)


def signed_scale(
    low: torch.Tensor, high: torch.Tensor, spec: GridSpec, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Compute the scale of a symmetric grid with the end of the range that is larger in magnitude on the lowest code.

    A symmetric grid has one more negative code than positive ones; with a negative scale it stands for a positive
    value. So a range takes ``2^(bits-1)`` scales, not ``(2^bits - 1) / 2``, and its largest value is not clipped.

    Args:
        low, high: ends of the range, of any shape, which is that of the result; widened to include zero.
        spec: the kind of grid; symmetric.
        dtype: in which the scale will be stored.

    Returns:
        The scale in the dtype of ``low``; its magnitude is rounded by ``storable_scale``.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = storable_scale(torch.maximum(-low, high) / -spec.low, dtype, -spec.low)
    return torch.where(high > -low, -scale, scale)


def make_grid(
    values: torch.Tensor,
    spec: GridSpec,
    observer: Literal["minmax", "mse"] = "minmax",
    dtype: torch.dtype | None = None,
    importance: torch.Tensor | None = None,
    *,
    signed: bool = False,
    norm: float = 2.0,
) -> Grid:
    """Fit the grid of a tensor to the smallest and largest of the values that share a scale.

    Args:
        values: ``[out, in]`` (any shape per tensor or token).
        spec: the kind of grid.
        observer: ``"minmax"`` covers the full range; ``"mse"`` tries shares of it (``RANGE_SHARES``) and keeps the one
            with the smallest sum of squared errors, for each scale.
        dtype: in which scales will be stored; None for that of ``values``.
        importance: ``[in]``, weight of each input channel in the sum of squared errors; None weighs all equally.
        signed: scales may be negative (``signed_scale``); symmetric grids.
        norm: exponent of the errors in that sum, 2 for squares; a larger one clips less.
    """
    dtype, spec = dtype or values.dtype, spec.fitted(values)
    parts = group_by_scale(values.to(torch.float64 if values.dtype == torch.float64 else torch.float32), spec)
    low, high = torch.aminmax(parts, dim=-1)
    scale, zero = (signed_scale(low, high, spec, dtype), None) if signed else qparams_from_range(low, high, spec, dtype)
    if observer == "mse":
        weights = None if importance is None else group_by_scale(importance.to(parts).expand(values.shape), spec)
        scale, zero = _search_mse(parts, low, high, spec, dtype, weights, signed, norm)
    shape = parts.shape[:-1]
    return Grid(spec, scale.reshape(shape), None if zero is None else zero.reshape(shape))


def _search_mse(
    parts: torch.Tensor,
    low: torch.Tensor,
    high: torch.Tensor,
    spec: GridSpec,
    dtype: torch.dtype,
    weights: torch.Tensor | None,
    signed: bool,
    norm: float,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the scales and zero points, among the shares of a range, with the smallest sum of squared errors."""
    best: torch.Tensor | None = None
    # There is one more negative code than positive ones. The first share maps the largest value to the largest code, of
    # NVFP4 to 4, below which codes lie closer; of MXFP4 it takes the next power of two.
    full = (spec.high - spec.low) / 2 / spec.high if spec.symmetric else 1.0
    full = {"nvfp4": 1.5, "mxfp4": 2.0}.get(spec.type, full)
    shares, signs = (full, *RANGE_SHARES) if full > 1 else RANGE_SHARES, (1, -1) if signed else (1,)
    for share, sign in itertools.product(shares, signs):
        scale, zero = qparams_from_range(low * share, high * share, spec, dtype)
        scale = scale * sign
        offset = torch.zeros_like(scale) if zero is None else zero.to(scale.dtype)
        factor, shift = scale.unsqueeze(-1), offset.unsqueeze(-1)
        error = (round_codes(parts, factor, shift, spec) - shift) * factor - parts
        error = error.square_() if norm == 2 else error.abs_().pow_(norm)
        total = (error if weights is None else error.mul_(weights)).sum(-1)
        if best is None:
            best, chosen, chosen_zero = total, scale, zero
            continue
        better = total < best
        best, chosen = torch.where(better, total, best), torch.where(better, scale, chosen)
        chosen_zero = zero if chosen_zero is None else torch.where(better, zero, chosen_zero)  # type: ignore[arg-type]
    return chosen, chosen_zero
