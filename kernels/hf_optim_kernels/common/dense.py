"""Products with a weight that is decoded for the call: faster than fused kernels for many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .launch_plan import prevent_recording

# Output rows of a part of the weight are a multiple of this.
_BLOCK = 128


def multiply_decoded(
    x: Tensor, rows: int, bias: Tensor | None, max_bytes: int, decode: Callable[[int, int | None], Tensor]
) -> Tensor:
    """Return ``x W^T + bias`` by the library's product: ``x`` [M, in], result [M, rows].

    Args:
        rows: of the weight.
        max_bytes: a weight that takes more is decoded and multiplied in parts.
        decode: ``first, count -> weight[first : first + count]`` in the dtype of ``x``; ``None`` counts to the end.
    """
    prevent_recording()
    parts = -(-rows * x.shape[1] * x.element_size() // max_bytes)
    if parts <= 1:
        return torch.nn.functional.linear(x, decode(0, None), bias)
    step = -(-rows // parts // _BLOCK) * _BLOCK
    out = torch.empty((x.shape[0], rows), dtype=x.dtype, device=x.device)
    for first in range(0, rows, step):
        count = min(step, rows - first)
        torch.mm(x, decode(first, count).T, out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)


def as_rows(x: Tensor) -> Tensor:
    """Return ``x`` [..., in] as [rows, in] whose columns are contiguous."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(0, x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def over_rows(x: Tensor, columns: int, product: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``product`` [M, columns] of ``x`` as [M, in], in the shape [..., columns]; not called without rows."""
    flat = as_rows(x)
    if len(flat) == 0 or columns == 0:
        return x.new_empty((*x.shape[:-1], columns))
    return product(flat).view(*x.shape[:-1], columns)


def empty_product(
    rows: torch.Size, columns: int, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """Return the product [*rows, columns] over no rows, or over no input columns: the bias, or zeros."""
    y = torch.zeros(*rows, columns, dtype=dtype, device=device)
    return y if bias is None else y + bias.to(dtype)
