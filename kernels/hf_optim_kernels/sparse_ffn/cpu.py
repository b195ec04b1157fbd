"""Sparse feed-forward layers on a CPU: chosen rows are read, and no others.

Rows of W2 in float32 and float64 are added up by ``embedding_bag``, which reads each of them once; everything else is
computed by the specification, whose ``index_select`` copies the chosen rows. The modules of a checkpoint do the same in
plain PyTorch, so that a checkpoint computes the same bits where this package is not installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import naive
from .naive import ACTIVATIONS, Layer, choose, products


def sparse_ffn(x: Tensor, layer: Layer) -> Tensor:
    """Return ``naive.sparse_ffn``, up to the order of sums."""
    if layer.down.bits < 16 or x.dtype not in (torch.float32, torch.float64) or x.device.type != "cpu":
        return naive.sparse_ffn(x, layer)
    units, factor = choose(x, layer)
    inner, function = products(x, layer.up, units), ACTIVATIONS[layer.act]
    inner = function(inner) if layer.gate is None else function(products(x, layer.gate, units)) * inner
    if factor is not None:
        inner = inner * factor
    out = torch.nn.functional.embedding_bag(units, layer.down.data, mode="sum", per_sample_weights=inner)
    return out if layer.bias is None else out + layer.bias
