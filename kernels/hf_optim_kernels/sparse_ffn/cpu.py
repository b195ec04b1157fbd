"""Sparse feed-forward layers on a CPU: chosen rows are read, and no others.

Rows are copied some at a time, and multiplied while a cache has the copies. Rows of W2 in float32 and float64 are added
up by ``embedding_bag``, without a copy. The modules of a checkpoint do the same in plain PyTorch, so that a checkpoint
computes the same bits where this package is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive
from .naive import ACTIVATIONS, Layer, Rows, choose, chosen_rows

COPIED_BYTES = 1 << 20
"""Of rows that are copied at a time."""


def sparse_ffn(x: Tensor, layer: Layer) -> Tensor:
    """Return ``naive.sparse_ffn``, up to the order of sums."""
    if x.device.type != "cpu":
        return naive.sparse_ffn(x, layer)
    units, factor = choose(x, layer)
    inner, function = _products(x, layer.up, units), ACTIVATIONS[layer.act]
    inner = function(inner) if layer.gate is None else function(_products(x, layer.gate, units)) * inner
    if factor is not None:
        inner = inner * factor
    out = _sum(inner, layer.down, units)
    return out if layer.bias is None else out + layer.bias


def _products(x: Tensor, matrix: Rows, units: Tensor) -> Tensor:
    """Return ``naive.products``."""
    plain = matrix._replace(bias=None)
    parts = [naive.products(x, plain, own) for own in units.split(_at_a_time(x, matrix.columns), 1)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    return out if matrix.bias is None else out + matrix.bias[units]


def _sum(inner: Tensor, down: Rows, units: Tensor) -> Tensor:
    """Return the sum ``[T, out]`` of the rows ``units`` of a matrix, weighted by ``inner``; both ``[T, blocks]``."""
    if down.bits == 16 and inner.dtype in (torch.float32, torch.float64):
        return torch.nn.functional.embedding_bag(units, down.data, mode="sum", per_sample_weights=inner)
    step = _at_a_time(inner, down.columns)
    parts = []
    for own, weights in zip(units.split(step, 1), inner.split(step, 1), strict=True):
        rows = chosen_rows(down, own.reshape(-1)).view(*own.shape, -1)
        parts.append(torch.bmm(weights.unsqueeze(1), rows).squeeze(1))
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)


def _at_a_time(x: Tensor, columns: int) -> int:
    """Return how many rows of each token are copied at a time."""
    return max(1, COPIED_BYTES // (x.element_size() * columns * max(1, len(x))))
