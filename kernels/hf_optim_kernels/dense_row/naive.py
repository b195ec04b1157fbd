"""The specification of the product of one row with a dense weight."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` in the dtype of ``x``, summed in float32 (float64 for float64).

    Args:
        x: ``[..., K]``, one row.
        weight: ``[N, K]``.
        bias: ``[N]``, or None.
    """
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    out = x.to(wide) @ weight.to(wide).T
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
