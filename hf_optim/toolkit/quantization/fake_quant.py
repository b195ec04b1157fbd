r"""Fake quantization: quantized weights in the forward pass, floating-point weights under the optimizer.

The value is that of ``grids``: ``v̂ = (q - z) s`` with ``q = clamp(round(v / s) + z)``. Rounding has no useful gradient,
so one of two estimators replaces it.

Straight-through (1308.3432; 1712.05877, section 3)::

    ∂v̂/∂v = 1 where the code is the nearest of all whole numbers, 0 where it was clamped

LSQ (Esser et al., 1902.08153, equations 3 and 5), which also learns the scale ``s`` (the paper's step size), with
``-Q_N = low - z`` and ``Q_P = high - z``::

    ∂v̂/∂s = round(v / s) - v / s     if -Q_N < v / s < Q_P      ∂v̂/∂v = 1
            -Q_N                      if v / s <= -Q_N            ∂v̂/∂v = 0
             Q_P                      if v / s >=  Q_P            ∂v̂/∂v = 0

The gradient of a scale is multiplied by ``1 / sqrt(N Q_P)`` (section 2.2), with ``N`` the number of weights that share
it (of a layer in the paper), and for the scale of a layer's inputs the number of its input features, however many
tokens a batch has. A scale starts at ``2 mean|v| / sqrt(Q_P)`` (section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..modules.hidden_parameters import hide_parameters
from ..modules.swap_class import restore_class, swap_class
from .grids import Grid, GridSpec, group_by_scale, make_grid, round_codes, stored_scale
from .scales import smallest_scale, storable_scale

# Learned scales: parameters of the layer during training, which are not part of a checkpoint of the model. The names
# are keys of the run's state in training checkpoints.
LEARNED_SCALES = ("weight_step", "input_step")
# The largest value lies half a scale beyond the largest code, give or take the rounding of the division.
CLAMP_MARGIN = 0.5 + 1e-4

InputQuantizer = Callable[["FakeQuantLinear", Tensor], Tensor]


class _StraightThrough(torch.autograd.Function):
    """Fake-quantize; the gradient passes where the code was not clamped. Scale and zero point are constants."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec) -> Tensor:
        scaled = parts / scale + zero
        low, high = spec.low - CLAMP_MARGIN, spec.high + CLAMP_MARGIN
        ctx.save_for_backward((scaled >= low).logical_and_(scaled <= high))
        return (round_codes(parts, scale, zero, spec) - zero) * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (inside,) = ctx.saved_tensors
        return gradients[0] * inside, None, None, None


class _LearnedScale(torch.autograd.Function):
    """Fake-quantize with the gradients of LSQ; that of the scale is multiplied by ``1 / sqrt(N Q_P)``."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, scale: Tensor, zero: Tensor, spec: GridSpec, count: int) -> Tensor:
        scaled = parts / scale
        codes = round_codes(parts, scale, zero, spec) - zero
        inside = (scaled > spec.low - zero).logical_and_(scaled < spec.high - zero)
        ctx.save_for_backward(inside, torch.where(inside, codes - scaled, codes))
        ctx.gradient_scale = (count * spec.high) ** -0.5
        return codes * scale

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        inside, slope = ctx.saved_tensors
        of_scale = (gradients[0] * slope).sum(-1, keepdim=True) * ctx.gradient_scale
        return gradients[0] * inside, of_scale, None, None, None


class _Rounded(torch.autograd.Function):
    """Round a learned scale to a positive number that the grid stores exactly; the gradient passes unchanged."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype, spec: GridSpec) -> Tensor:
        return stored_scale(scale.clamp(min=smallest_scale(dtype)), spec, dtype, _largest_code(spec))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


def fake_quantize(values: Tensor, grid: Grid, count: int | None = None) -> Tensor:
    """Round ``values`` to the nearest points of ``grid``, with the straight-through gradient.

    Args:
        values: ``[out, in]`` (any shape per tensor or token), a float dtype.
        grid: its scales and zero points are constants, unless ``grid.scale`` requires a gradient (see ``round_scale``):
            then the gradients are those of LSQ, for the scale as well.
        count: LSQ's ``N``: features of a layer's input; None for the values that share a scale, as for weights.

    Returns:
        The shape and dtype of ``values``; bitwise identical to what a checkpoint with the grid's codes decodes to.
    """
    parts = group_by_scale(values.to(grid.scale.dtype), grid.spec)
    shape = (*parts.shape[:-1], 1)
    scale = grid.scale.reshape(shape)
    zero = torch.zeros_like(scale) if grid.zero_point is None else grid.zero_point.to(scale.dtype).reshape(shape)
    found: Tensor
    if grid.scale.requires_grad:
        count = parts.shape[-1] if count is None else count
        found = _LearnedScale.apply(parts, scale, zero.detach(), grid.spec, count)  # type: ignore[no-untyped-call]
    else:
        found = _StraightThrough.apply(parts, scale, zero.detach(), grid.spec)  # type: ignore[no-untyped-call]
    return found.reshape(values.shape).to(values.dtype)


def round_scale(scale: Tensor, dtype: torch.dtype, spec: GridSpec) -> Tensor:
    """Round a learned scale as ``stored_scale`` does, for a grid of this kind; the gradient passes unchanged.

    A scale that became negative in training is the smallest that ``dtype`` stores.
    """
    return _Rounded.apply(scale, dtype, spec)  # type: ignore[no-untyped-call]


def _largest_code(spec: GridSpec) -> float:
    """Return an upper limit on the magnitude of ``code - zero_point``."""
    return -spec.low if spec.symmetric else spec.high - spec.low


@torch.no_grad()
def initial_scale(values: Tensor, spec: GridSpec, dtype: torch.dtype | None = None) -> Tensor:
    """Return LSQ's initial scale, ``2 mean|v| / sqrt(Q_P)``, for each set of values that shares one.

    Args:
        values: ``[out, in]`` (any shape per tensor or token).
        spec: the kind of grid; symmetric.
        dtype: in which scales will be stored; None for that of ``values``.

    Returns:
        The shape of ``Grid.scale``; float32, or float64 for float64 values.
    """
    parts = group_by_scale(values.to(torch.float64 if values.dtype == torch.float64 else torch.float32), spec)
    return storable_scale(2 * parts.abs().mean(-1) / spec.high**0.5, dtype or values.dtype, _largest_code(spec))


class FakeQuantLinear(nn.Linear):
    """An ``nn.Linear`` with fake-quantized weights and inputs: made by ``attach_fake_quant``, in place.

    Parameters keep their names, so checkpoints of the model do not change; a learned scale is a parameter (for the
    optimizer) that no state dict contains.

    Attributes:
        spec: the kind of grid; None leaves the weights as they are.
        observer: how every forward computes the scales from the weights: ``"minmax"`` or ``"mse"``.
        fixed_grid: a grid that does not follow the weights, or None.
        latent: floating-point weights to use in place of ``weight``, ``[out, in]``, float32 or float64, or None.
        quantize_input: fake-quantizes the inputs, called with the layer and its input; or None.
        active: False computes as ``nn.Linear``.
    """

    spec: GridSpec | None
    observer: Literal["minmax", "mse"]
    fixed_grid: Grid | None
    latent: Tensor | None
    quantize_input: InputQuantizer | None
    active: bool
    input_step: nn.Parameter  # the learned scale of the inputs

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        if self.quantize_input is not None:
            input = self.quantize_input(self, input)
        return F.linear(input, self.weight if self.spec is None else self.fake_weight(), self.bias)

    def fake_weight(self) -> Tensor:
        """Return the fake-quantized weight, ``[out, in]`` in the weight's dtype."""
        return fake_quantize(self.float_weight(), self.grid()).to(self.weight.dtype)

    def float_weight(self) -> Tensor:
        """Return the weight before quantization: ``latent`` if there is one, else ``weight``."""
        return self.weight if self.latent is None else self.latent

    def grid(self) -> Grid:
        """Return the grid of the next forward. Its scale requires a gradient if it is learned."""
        assert self.spec is not None
        learned = self._parameters.get("weight_step")
        zero = None if self.fixed_grid is None else self.fixed_grid.zero_point
        if learned is not None:
            return Grid(self.spec, round_scale(learned, self.weight.dtype, self.spec), zero)
        if self.fixed_grid is not None:
            return self.fixed_grid
        # Not cached: the fused kernels of an optimizer change weights without a new version counter.
        with torch.no_grad():
            return make_grid(self.float_weight(), self.spec, self.observer, self.weight.dtype)

    @torch.no_grad()
    def quantize_weight(self) -> tuple[Tensor, Grid]:
        """Return the codes ``[out, in]`` of the current weight and their grid, without gradients."""
        grid = self.grid()
        return grid.quantize(self.float_weight()), grid

    def learn_scale(self, grid: Grid) -> nn.Parameter:
        """Learn the scale, starting from that of ``grid``, and keep its zero points. Returns the new parameter."""
        self.fixed_grid = grid
        self.weight_step = nn.Parameter(grid.scale.detach().clone())
        return self.weight_step

    # -- learned scales are not part of a checkpoint of the model ----------------------------------------------------
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
    fixed_grid: Grid | None = None,
    latent: Tensor | None = None,
    quantize_input: InputQuantizer | None = None,
    active: bool = True,
) -> FakeQuantLinear:
    """Turn a linear layer into a ``FakeQuantLinear`` in place, and return it; see there for the arguments.

    Hooks and references to the layer stay valid. Raises ``ValueError`` for a layer with its own ``forward``.
    """
    if type(layer).forward is not nn.Linear.forward or "forward" in layer.__dict__:
        raise ValueError(f"a {type(layer).__name__} with its own forward cannot be fake-quantized")
    return swap_class(
        layer,
        FakeQuantLinear,
        spec=spec,
        observer=observer,
        fixed_grid=fixed_grid,
        latent=latent,
        quantize_input=quantize_input,
        active=active,
    )


def detach_fake_quant(layer: FakeQuantLinear) -> nn.Linear:
    """Undo ``attach_fake_quant``, and return the layer; its weight does not change."""
    for name in LEARNED_SCALES:
        layer._parameters.pop(name, None)
    return cast(nn.Linear, restore_class(layer))


def fake_quant_layers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, FakeQuantLinear]:
    """Return the fake-quantized layers among ``(name, module)`` pairs."""
    return {name: module for name, module in modules if isinstance(module, FakeQuantLinear)}
