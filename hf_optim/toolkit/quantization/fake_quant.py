r"""Fake quantization: weights on a grid in the forward pass, floating-point weights under the optimizer.

The value is that of ``grids``: ``v̂ = (q - z) s`` with ``q = clamp(round(v / s) + z)``. Rounding has no useful gradient;
two are put in its place.

Straight through (1308.3432; 1712.05877, section 3)::

    ∂v̂/∂v = 1 where the code is the nearest of all whole numbers, 0 where it had to be clamped

LSQ (Esser et al., 1902.08153, equations 3 and 5), which learns the step ``s`` too, ``-Q_N = low - z``,
``Q_P = high - z``::

    ∂v̂/∂s = round(v / s) - v / s     if -Q_N < v / s < Q_P      ∂v̂/∂v = 1
            -Q_N                      if v / s <= -Q_N            ∂v̂/∂v = 0
             Q_P                      if v / s >=  Q_P            ∂v̂/∂v = 0

The gradient of a step is multiplied by ``1 / sqrt(N Q_P)``, ``N`` being the number of values that share it (section
2.2), and a step begins at ``2 mean|v| / sqrt(Q_P)`` (section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.hidden_parameters import hide_parameters
from .grids import Grid, GridSpec, group_by_scale, make_grid, round_codes

# Steps that are learned: parameters of the layer in training, and no part of its checkpoint.
LEARNED_SCALES = ("weight_step", "input_step")
# A scale made of the largest value puts it half a step beyond the largest code, give or take the division's rounding.
REACH = 0.5 + 1e-4

InputQuantizer = Callable[["FakeQuantLinear", Tensor], Tensor]


class _StraightThrough(torch.autograd.Function):
    """Values on their grid; the gradient passes where the code was not clamped. The spec and sides are constants."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
        scaled = parts / scale + zero
        low, high = spec.low - REACH, spec.high + REACH
        ctx.save_for_backward((scaled >= low).logical_and_(scaled <= high))
        return (round_codes(parts, scale, zero, spec) - zero) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _LearnedStep(torch.autograd.Function):
    """Values on their grid, with LSQ's gradients; that of the step is scaled."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
        scaled = parts / scale
        codes = round_codes(parts, scale, zero, spec) - zero
        inside = (scaled > spec.low - zero).logical_and_(scaled < spec.high - zero)
        ctx.save_for_backward(inside, torch.where(inside, codes - scaled, codes))
        ctx.share = (parts.shape[-1] * spec.high) ** -0.5
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        inside, slope = ctx.saved_tensors
        step = (gradients[0] * slope).sum(-1, keepdim=True) * ctx.share
        return gradients[0] * inside, step, None, None


class _Rounded(torch.autograd.Function):
    """A learned step as it will be stored: positive and exact in the weight's dtype. The gradient passes."""

    @staticmethod
    def forward(ctx: Any, step: Tensor, dtype: torch.dtype) -> Tensor:
        return step.clamp(min=torch.finfo(dtype).eps).to(dtype).to(step.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def fake_quantize(values: Tensor, grid: Grid) -> Tensor:
    """``values`` moved to the nearest points of ``grid``, with the straight-through gradient.

    Args:
        values: ``[out, in]`` (any shape per tensor or token), a float dtype; the result has its shape and dtype, and is
            bit by bit what a checkpoint with the grid's codes decodes to.
        grid: the scales and zero points are constants here. With ``grid.scale`` requiring a gradient (see
            ``round_scale``), the gradients are LSQ's, and one of the scale is among them.
    """
    parts = group_by_scale(values.to(grid.scale.dtype), grid.spec)
    shape = (*parts.shape[:-1], 1)
    scale = grid.scale.reshape(shape)
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.to(scale.dtype).reshape(shape)
    function = _LearnedStep if grid.scale.requires_grad else _StraightThrough
    found: Tensor = function.apply(parts, scale, zero.detach(), grid.spec)  # type: ignore[no-untyped-call]
    return found.reshape(values.shape).to(values.dtype)


def round_scale(step: Tensor, dtype: torch.dtype) -> Tensor:
    """A learned step as the scale of a grid: positive, and rounded to the ``dtype`` of the checkpoint."""
    return _Rounded.apply(step, dtype)  # type: ignore[no-untyped-call]


@torch.no_grad()
def initial_scale(values: Tensor, spec: GridSpec, dtype: torch.dtype | None = None) -> Tensor:
    """LSQ's first step, ``2 mean|v| / sqrt(Q_P)``, for each set of values that shares one.

    Args:
        values: ``[out, in]`` (any shape per tensor or token).
        spec: the kind of grid; symmetric.
        dtype: in which scales will be stored; None for that of ``values``.

    Returns:
        Of the shape of ``Grid.scale``; float32, or float64 for float64 values.
    """
    parts = group_by_scale(values.to(torch.float64 if values.dtype == torch.float64 else torch.float32), spec)
    return round_scale(2 * parts.abs().mean(-1) / spec.high**0.5, dtype or values.dtype)


class FakeQuantLinear(nn.Linear):
    """An ``nn.Linear`` that computes with its weight on a grid: made in place by ``attach_fake_quant``, undone by ``detach_fake_quant``.

    Parameters keep their names, so a checkpoint of the model is an ordinary one; a learned step is a parameter (the
    optimizer finds it) that no state dict has.

    Attributes:
        spec: the kind of grid; None leaves the weights as they are.
        observer: how scales follow from the weights: ``"minmax"`` or ``"mse"``, anew in every forward.
        fixed: a grid that stays, or None.
        latent: floating-point weights to use in place of ``weight``, ``[out, in]``, float32 or float64, or None.
        inputs: quantizes the layer's inputs, or None.
        active: False computes as ``nn.Linear``.
        former: the class it had.
    """

    spec: GridSpec | None
    observer: Literal["minmax", "mse"]
    fixed: Grid | None
    latent: Tensor | None
    inputs: InputQuantizer | None
    active: bool
    former: type[nn.Linear]
    input_step: nn.Parameter  # of inputs on a learned grid

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        if self.inputs is not None:
            input = self.inputs(self, input)
        return F.linear(input, self.weight if self.spec is None else self.fake_weight(), self.bias)

    def fake_weight(self) -> Tensor:
        """The weight on its grid, ``[out, in]`` in the weight's dtype."""
        return fake_quantize(self.source(), self.grid()).to(self.weight.dtype)

    def source(self) -> Tensor:
        """What is rounded: the latent weight, or the weight."""
        return self.weight if self.latent is None else self.latent

    def grid(self) -> Grid:
        """The grid of the next forward. Its scale has a gradient where it is learned."""
        assert self.spec is not None
        step = self._parameters.get("weight_step")
        zero = None if self.fixed is None else self.fixed.zero_point
        if step is not None:
            return Grid(self.spec, round_scale(step, self.weight.dtype), zero)
        if self.fixed is not None:
            return self.fixed
        # Made anew each time: an optimizer's fused kernels change weights without a mark that could be looked at.
        with torch.no_grad():
            return make_grid(self.source(), self.spec, self.observer, self.weight.dtype)

    @torch.no_grad()
    def codes(self) -> tuple[Tensor, Grid]:
        """The codes ``[out, in]`` of the weight as it is now, and their grid, without gradients."""
        grid = self.grid()
        return grid.quantize(self.source()), grid

    def learn_scale(self, grid: Grid) -> nn.Parameter:
        """Learn the scale, beginning with that of ``grid``, whose zero points stay. Returns the parameter."""
        self.fixed = grid
        self.weight_step = nn.Parameter(grid.scale.detach().clone())
        return self.weight_step

    # -- what no checkpoint has ---------------------------------------------------------------------------------------
    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with hide_parameters(self, LEARNED_SCALES):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with hide_parameters(self, LEARNED_SCALES):
            super()._load_from_state_dict(*args, **kwargs)


def attach_fake_quant(
    layer: nn.Linear,
    spec: GridSpec | None,
    observer: Literal["minmax", "mse"] = "minmax",
    *,
    fixed: Grid | None = None,
    latent: Tensor | None = None,
    inputs: InputQuantizer | None = None,
    active: bool = True,
) -> FakeQuantLinear:
    """Make a layer compute with its weight on a grid, in place: see ``FakeQuantLinear`` for the arguments.

    The class of the layer is changed; hooks and references to it stay valid. Raises ``ValueError`` for a layer that
    does not compute as ``nn.Linear``.
    """
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        raise ValueError(f"a {type(layer).__name__} with a forward of its own cannot be fake-quantized")
    former = type(layer)
    layer.__class__ = FakeQuantLinear
    assert isinstance(layer, FakeQuantLinear)
    fields = {"spec": spec, "observer": observer, "fixed": fixed, "latent": latent, "inputs": inputs}
    layer.__dict__.update(fields, active=active, former=former)
    return layer


def detach_fake_quant(layer: FakeQuantLinear) -> nn.Linear:
    """Undo ``attach_fake_quant``; the weight stays as it is."""
    for name in LEARNED_SCALES:
        layer._parameters.pop(name, None)
    former = layer.former
    for name in ("spec", "observer", "fixed", "latent", "inputs", "active", "former"):
        layer.__dict__.pop(name, None)
    layer.__class__ = former  # type: ignore[assignment]
    return layer


def fake_quant_layers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, FakeQuantLinear]:
    """The fake-quantized layers among named modules."""
    return {name: module for name, module in modules if isinstance(module, FakeQuantLinear)}
