"""Packed linear layers on PyTorch's own CPU operators: their base, and the support of ``aten::_int_mm``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .support import unsupported_dtype

INT_MM_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Sums of products of int8 codes stay below 2^31 up to here.
MOST_INT_MM_COLUMNS = 1 << 16


def unsupported_by_int_mm(dtype: torch.dtype, columns: int) -> str | None:
    """Return why inputs [..., columns] are not multiplied by ``aten::_int_mm`` on this CPU; None if they are."""
    if columns > MOST_INT_MM_COLUMNS:
        return f"{columns} columns: int32 sums are exact up to {MOST_INT_MM_COLUMNS}"
    if dtype in INT_MM_DTYPES and not torch.cpu._is_vnni_supported():
        return "PyTorch's integer product was measured with AVX512-VNNI, which this CPU does not have"
    return unsupported_dtype(dtype, INT_MM_DTYPES)


class CpuLinear(nn.Module):
    """A packed linear layer on an operator of PyTorch. The gradient of ``x`` is that of ``x W^T``.

    Attributes:
        packed: the codes, in the operator's layout.
        dtype: of inputs and outputs.
    """

    packed: Tensor
    dtype: torch.dtype

    def accepts(self, x: Tensor) -> bool:
        """Return True if ``x`` has the dtype and the device of the layer."""
        return x.dtype == self.dtype and x.device == self.packed.device

    def forward(self, x: Tensor) -> Tensor:
        """Return the product for ``x`` [..., in]: [..., out]."""
        if x.requires_grad and torch.is_grad_enabled():
            return _StraightThrough.apply(x, self)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """Return ``forward(x)`` without a gradient."""
        raise NotImplementedError

    def decoded(self, dtype: torch.dtype) -> Tensor:
        """Return the weight [out, in]."""
        raise NotImplementedError


class _StraightThrough(torch.autograd.Function):
    """The product, whose gradient passes straight through a rounding of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: CpuLinear) -> Tensor:
        ctx.layer = layer
        return layer.product(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad @ ctx.layer.decoded(grad.dtype), None


def cat_optional(layers: list[Any], name: str) -> Tensor | None:
    """Concatenate a buffer of several layers along the output; None if the first layer has none."""
    return None if getattr(layers[0], name) is None else torch.cat([getattr(layer, name) for layer in layers])
