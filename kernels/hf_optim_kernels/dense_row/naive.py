"""The specification of products of one row with dense weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..experts.naive import activate

MOST_WEIGHTS = 3
"""Weights of a launch."""
NO_ACT = -1
"""No activation; others are those of ``experts.naive``."""


def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` in the dtype of ``x``, summed in float32 (float64 for float64).

    Args:
        x: ``[..., K]``, one row.
        weight: ``[N, K]``.
        bias: ``[N]``, or None.
    """
    wide = _wide(x)
    out = x.to(wide) @ weight.to(wide).T
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)


def dense_rows(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), act: int = NO_ACT) -> list[Tensor]:
    """Return the products of one row with several weights, rounded to the dtype of ``x`` as layers one by one are.

    Args:
        x: ``[..., K]``, one row.
        weights: ``[N_i, K]``, up to three.
        biases: ``[N_i]`` of each, or none.
        act: an activation: ``weights`` are a gate and its values, and the result is one row, ``act(gate) * values``.
    """
    rows = [dense_row(x, weight, biases[at] if biases else None) for at, weight in enumerate(weights)]
    if act != NO_ACT:
        rows = [activate(rows[0].to(_wide(x)), act).to(x.dtype) * rows[1]]
    return rows


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32
