r"""Learned rounding: an offset for each weight before it is rounded, and a share of each group's range.

Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs" (2309.05516),
equations 3 to 5. With the range ``[low, high]`` of the weights that share a scale::

    s  = (b high - a low) / (2^bits - 1)          symmetric: 2 max(b high, -a low) / (2^bits - 1)
    q  = clamp(round(w / s + z + V))              V in [-0.5, 0.5]
    w^ = (q - z) s                                a, b in (0, 1]

The gradient of the rounding is that of the identity, so ``V`` moves a code where the block's output gains by it, and
``a`` and ``b`` the range. The scale that a checkpoint stores is rounded to the dtype of the weights in every forward,
and the zero point to a whole number; what is trained is what is stored.

Ours, symmetric grids: with ``signed`` the scale is ``+-max(b high, -a low) / 2^(bits-1)``, negative where ``high`` is
the larger end, so that the extra negative code stands for it (``signed_scale``).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from .fake_quant import round_scale
from .grids import Grid, GridSpec, code_step, group_by_scale, make_grid, nearest_codes

PAPERS_OFFSET = 0.5  # a weight is rounded up or down, and no further
# Smallest share of a range: at 0 a scale would be 0, from which no gradient leads back. A range that was searched for
# may grow again, that of the weights may not.
SMALLEST_SHARE, LARGEST_SHARE = 0.05, {"minmax": 1.0, "mse": 2.0}


class LearnedRounding:
    """The trained parameters of one weight matrix.

    Attributes:
        spec: the kind of grid; integer codes.
        offset: ``V``, ``[out, in]``, leaf that requires gradients; float32, or float64 for float64 weights.
        shares: ``a`` and ``b``, each of the shape of a scale, leaves; empty if the range is not learned.
    """

    def __init__(
        self,
        weight: Tensor,
        spec: GridSpec,
        observer: Literal["minmax", "mse"] = "minmax",
        *,
        learn_range: bool = True,
        signed: bool = False,
        largest_offset: float | None = PAPERS_OFFSET,
    ) -> None:
        """Begin at round-to-nearest.

        Args:
            weight: ``[out, in]``, any float type; kept as it is.
            spec: the kind of grid.
            observer: the range that shares are of: ``"minmax"``, or that of the least squared error (``"mse"``).
            learn_range: train the shares.
            signed: scales may be negative (``signed_scale``); symmetric grids.
            largest_offset: bound of the offsets, in codes; None lets a code move as far as it likes.
        """
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.weight, self.dtype = weight.detach().to(wide), weight.dtype
        self.spec, self._largest = spec.fitted(self.weight), LARGEST_SHARE[observer]
        self.offset = torch.zeros_like(self.weight).requires_grad_()
        self.shares: tuple[Tensor, ...] = ()
        self.largest_offset = largest_offset
        grid = make_grid(self.weight, self.spec, observer, weight.dtype, signed=signed)
        # Symmetric: the scales that the larger side of a range takes, and their signs.
        self._levels, self._sign = -spec.low if signed else (spec.high - spec.low) / 2, grid.scale.sign()
        self._low, self._high = _range_of(grid, group_by_scale(self.weight, spec), observer, self._levels)
        self._plain = None if learn_range else grid
        if learn_range:
            self.shares = tuple(torch.ones_like(self._low).requires_grad_() for _ in range(1 if spec.symmetric else 2))

    def parameters(self) -> list[Tensor]:
        """Return the leaves to train: the offset, then the shares."""
        return [self.offset, *self.shares]

    @torch.no_grad()
    def project(self) -> None:
        """Bring offsets and shares back into their bounds, in place."""
        if self.largest_offset is not None:
            self.offset.clamp_(-self.largest_offset, self.largest_offset)
        for share in self.shares:
            share.clamp_(SMALLEST_SHARE, self._largest)

    def grid(self) -> Grid:
        """Return the grid that is stored; its scale has the gradient of the shares."""
        if self._plain is not None:
            return self._plain
        spec = self.spec
        if spec.symmetric:
            scale = round_scale(self._high * self.shares[0] / self._levels, self.dtype, spec)
            return Grid(spec, scale * self._sign)
        low, high = self._low * self.shares[0], self._high * self.shares[1]
        scale = round_scale((high / 2 - low / 2) / self._levels, self.dtype, spec)
        zero = (spec.low - low.detach() / scale.detach()).round().clamp(spec.low, spec.high)
        return Grid(spec, scale, zero.to(torch.int8))

    def fake_weight(self) -> Tensor:
        """Return the quantized weight ``[out, in]`` in the weight's dtype, with the gradients of the parameters."""
        grid = self.grid()
        parts, offset = group_by_scale(self.weight, self.spec), group_by_scale(self.offset, self.spec)
        scale, zero = grid.scale_and_zero(parts)
        shift = None if self.spec.symmetric else zero
        found: Tensor = _Learned.apply(parts, offset, scale, shift, self.spec)  # type: ignore[no-untyped-call]
        return found.reshape(self.weight.shape).to(self.dtype)

    @torch.no_grad()
    def quantize(self) -> tuple[Tensor, Grid]:
        """Return the int8 codes ``[out, in]`` and their grid, without gradients."""
        grid = self.grid()
        grid = Grid(grid.spec, grid.scale.detach(), grid.zero_point)
        parts = group_by_scale(self.weight, self.spec)
        scale, zero = grid.scale_and_zero(parts)
        shift = None if self.spec.symmetric else zero
        scaled, _ = _with_offset(parts / scale, group_by_scale(self.offset, self.spec), shift, self.spec)
        codes = nearest_codes(scaled, self.spec)
        return codes.reshape(self.weight.shape).to(torch.int8), grid


class _Learned(torch.autograd.Function):
    """Round to codes and back, ``(q - z) s``, with the gradients of the offsets and of the scale.

    That of the rounding is the identity's, and 0 where a code is clamped; zero points are constants. In one function,
    since every step computes it for every weight of a block: autograd would keep six tensors of their size.
    """

    @staticmethod
    def forward(ctx: Any, parts: Tensor, offset: Tensor, scale: Tensor, zero: Tensor | None, spec: GridSpec) -> Tensor:
        raw = parts / scale
        scaled, step = _with_offset(raw, offset, zero, spec)
        if spec.is_float4:
            # The largest code is the nearest up to half of the last step beyond it.
            inside = scaled.abs() < spec.high + 2
            codes = nearest_codes(scaled, spec)
        else:
            codes = scaled.round_()
            inside = (codes >= spec.low).logical_and_(codes <= spec.high)
            codes.clamp_(spec.low, spec.high)
        if zero is not None:
            codes.sub_(zero)
        found = codes * scale
        # Of a scale: q - z where the code is clamped, else q - z - w / s.
        slope = codes.sub_(raw.mul_(inside)) if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(inside if isinstance(step, float) else inside * step, scale, slope)
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor | None, None, None]:
        (gradient,) = gradients
        steps, scale, slope = ctx.saved_tensors
        of_scale = None if slope is None else (gradient * slope).sum(-1, keepdim=True)
        return None, (gradient * scale).mul_(steps), of_scale, None, None


def _with_offset(raw: Tensor, offset: Tensor, zero: Tensor | None, spec: GridSpec) -> tuple[Tensor, Tensor | float]:
    """Return ``w / s + z + V``, what is rounded to codes, from ``w / s``; and the step between the codes around it.

    That of 4-bit floats differs: an offset of 0.5 is half of it, so that codes go up or down.
    """
    scaled = raw if zero is None else raw + zero
    step = code_step(scaled, spec)
    return scaled + (offset if isinstance(step, float) else offset * step), step


def _range_of(grid: Grid, parts: Tensor, observer: str, levels: float) -> tuple[Tensor, Tensor]:
    """Return the ends of the ranges of a grid, in the shape of its scale.

    With ``"minmax"`` those of the weights, which the rounding of scales and zero points does not move.
    """
    spec, scale = grid.spec, grid.scale
    low, high = (end.reshape(scale.shape) for end in torch.aminmax(parts, dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    if observer == "minmax":
        return (low, high) if not spec.symmetric else (low, torch.maximum(-low, high))
    if spec.symmetric:
        # The search may choose more than the range: the largest weight on the largest code.
        return low, scale.abs() * levels
    assert grid.zero_point is not None
    zero = grid.zero_point.to(scale.dtype)
    return (spec.low - zero) * scale, (spec.high - zero) * scale
