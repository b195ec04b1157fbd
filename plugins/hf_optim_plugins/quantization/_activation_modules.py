"""Modules that round their input to static 8-bit grids, one grid for each group of channels.

This file is stored beside checkpoints whose activations no stock class can round, so it imports only torch and
transformers. With the scale ``s_g`` and the zero point ``z_g`` of the group ``g(j)`` of channel ``j``::

    q(x)_j = s_g (clamp(round(x_j / s_g) + z_g, -128, 127) - z_g)

A linear layer keeps its weight as int8 codes with one scale for each row, or for each row and group of channels. Its
product is computed in floating point on the decoded weight: ``y = q(x) (s C)^T + b``.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import ReplacedModules


class InputGrids(nn.Module):
    """Base of modules that round their input. With ``groups`` 0 the input is not rounded.

    ``input_scale`` [groups], ``input_zero`` [groups] int8, ``input_group`` [channels] int32: the group of each channel.
    """

    holds_codes: ClassVar[bool] = True
    input_scale: Tensor
    input_zero: Tensor
    input_group: Tensor

    def add_grids(self, channels: int, groups: int, like: Tensor) -> None:
        """Register buffers for the grids."""
        self.groups = groups
        if groups:
            self.register_buffer("input_scale", torch.ones(groups, dtype=like.dtype, device=like.device))
            self.register_buffer("input_zero", torch.zeros(groups, dtype=torch.int8, device=like.device))
            self.register_buffer("input_group", torch.zeros(channels, dtype=torch.int32, device=like.device))

    def set_grids(self, scale: Tensor, zero: Tensor, group: Tensor) -> None:
        """Copy the grids into the buffers."""
        for buffer, value in ((self.input_scale, scale), (self.input_zero, zero), (self.input_group, group)):
            buffer.copy_(value)

    def rounded(self, x: Tensor) -> Tensor:
        """Round ``x`` ``[..., channels]`` to the nearest points of its grids, in its dtype."""
        if not self.groups:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        group = self.input_group.long()
        scale, zero = self.input_scale.to(wide.dtype)[group], self.input_zero.to(wide.dtype)[group]
        codes = (torch.round(wide / scale) + zero).clamp(-128, 127)
        return ((codes - zero) * scale).to(x.dtype)


class RoundedLinear(InputGrids):
    """A linear layer on rounded inputs. ``weight`` [out, in]: int8 codes if it has scales, else the original weight.

    Args:
        in_features, out_features, bias: of the layer.
        groups: of input channels, see ``InputGrids``.
        scales: scales per row, ``weight_scale`` [out, scales]: 0, 1 or ``groups``.
        transposed: the stock layer is a ``Conv1D``, which stores its weight as [in, out].
        like: a tensor with the dtype and device of the stock layer.
    """

    weight_scale: Tensor

    def __init__(
        self, in_features: int, out_features: int, bias: bool, groups: int, scales: int, transposed: bool, like: Tensor
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scales, self.transposed = scales, transposed
        dtype = torch.int8 if scales else like.dtype
        weight = torch.zeros(out_features, in_features, dtype=dtype, device=like.device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        if scales:
            ones = torch.ones(out_features, scales, dtype=like.dtype, device=like.device)
            self.register_buffer("weight_scale", ones)
        self.bias = nn.Parameter(torch.zeros(out_features, dtype=like.dtype, device=like.device)) if bias else None
        self.add_grids(in_features, groups, like)

    @classmethod
    def in_place_of(cls, layer: Any, groups: int, scales: int) -> RoundedLinear:
        """Return a layer of the shape of a stock one, with empty tensors."""
        transposed = isinstance(layer, Conv1D)
        rows, columns = layer.weight.shape[::-1] if transposed else layer.weight.shape
        return cls(columns, rows, layer.bias is not None, groups, scales, transposed, layer.weight)

    def decoded(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the decoded weight ``[out, in]``."""
        if not self.scales:
            return self.weight if dtype is None else self.weight.to(dtype)
        scale = self.weight_scale.to(dtype or self.weight_scale.dtype)
        return self.weight.to(scale.dtype) * (scale if self.scales == 1 else scale[:, self.input_group.long()])

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.rounded(x), self.decoded(x.dtype), self.bias)

    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock layer with the decoded weight, and whether it computes the same."""
        weight = self.decoded()
        made: nn.Module
        if self.transposed:
            made = Conv1D(self.out_features, self.in_features).to(weight)
        else:
            made = nn.Linear(self.in_features, self.out_features, self.bias is not None).to(weight)
        with torch.no_grad():
            made.weight.copy_(weight.T if self.transposed else weight)  # type: ignore[operator, arg-type]
            if self.bias is not None:
                made.bias.copy_(self.bias)  # type: ignore[operator, arg-type]
        return made.train(self.training), self.groups == 0


class RoundedNorm(InputGrids):
    """A normalization of any class on rounded inputs."""

    def __init__(self, inner: Any, groups: int) -> None:
        super().__init__()
        self.inner = inner
        self.add_grids(inner.weight.numel(), groups, inner.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(self.rounded(x))

    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock module, and whether it computes the same: it does not round its inputs."""
        return self.inner, self.groups == 0


class RoundedActivationModel(ReplacedModules):
    """Base of a model class in which the modules named in ``config.activation_grids`` round their input."""

    replaced_field = "activation_grids"

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        if entry["kind"] == "norm":
            return RoundedNorm(module, entry["groups"])
        return RoundedLinear.in_place_of(module, entry["groups"], entry["scales"])
