"""The specification of a sparse feed-forward layer for few tokens, in plain PyTorch (see ``op`` for the operator).

    t = x C1^T,   l = t C2^T + c,   u_b = argmax of l over the units of block b
    h_b = act(W1[u_b] x + b1[u_b])        or, with a gate,   act(Wg[u_b] x + bg[u_b]) * (W1[u_b] x + b1[u_b])
    y = sum_b h_b W2[u_b] + b2

A unit is a row of every matrix, also of W2, which is stored transposed. Matrices are floats, or rows of codes with
scales for groups of columns: int8, or 4 bits of which byte k of a group of G holds column k in its low half and column
k + G/2 in its high half, each plus 8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


class Rows(NamedTuple):
    """A matrix of which rows are read.

    Attributes:
        data: ``[units, columns]`` of floats or int8 codes, or ``[units, columns / 2]`` of bytes with two codes.
        scale: ``[units, groups]`` of codes; None of floats.
        bias: ``[units]``, added to a product with a row; None for none.
    """

    data: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None

    @property
    def bits(self) -> int:
        """Bits of a weight; 16 for floats of any width."""
        return 16 if self.scale is None else 4 if self.data.dtype == torch.uint8 else 8

    @property
    def columns(self) -> int:
        """Columns of the matrix."""
        return self.data.shape[1] * (2 if self.bits == 4 else 1)

    @property
    def group(self) -> int:
        """Columns with one scale; all of them for floats."""
        return self.columns if self.scale is None else self.columns // self.scale.shape[1]


class Layer(NamedTuple):
    """The tensors of a layer with ``blocks * block`` units.

    Attributes:
        first, second, logit_bias: C1 ``[rank, in]``, C2 ``[units, rank]`` and c ``[units]`` or None.
        up, gate, down: W1, Wg or None, and W2, transposed.
        bias: b2 ``[out]`` or None.
        block: N.
        act: of ``ACTIVATIONS``.
        weighted: multiply a unit by the probability of its choice.
    """

    first: Tensor
    second: Tensor
    logit_bias: Tensor | None
    up: Rows
    gate: Rows | None
    down: Rows
    bias: Tensor | None
    block: int
    act: str
    weighted: bool = False


def sparse_ffn(x: Tensor, layer: Layer) -> Tensor:
    """Return ``[T, out]`` for ``x`` ``[T, in]``."""
    units, factor = choose(x, layer)
    inner = products(x, layer.up, units)
    function = ACTIVATIONS[layer.act]
    inner = function(inner) if layer.gate is None else function(products(x, layer.gate, units)) * inner
    if factor is not None:
        inner = inner * factor
    rows = chosen_rows(layer.down, units.reshape(-1)).view(*units.shape, -1)
    out = torch.bmm(inner.unsqueeze(1), rows).squeeze(1)
    return out if layer.bias is None else out + layer.bias


def choose(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Return the chosen units int64 ``[T, blocks]``, and their probabilities if they are multiplied."""
    logits = F.linear(F.linear(x, layer.first), layer.second, layer.logit_bias).view(len(x), -1, layer.block)
    choice = logits.argmax(-1)
    units = choice + torch.arange(0, logits.shape[1] * layer.block, layer.block, device=x.device)
    if not layer.weighted:
        return units, None
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return units, wide.softmax(-1).gather(-1, choice.unsqueeze(-1)).squeeze(-1).to(x.dtype)


def products(x: Tensor, matrix: Rows, units: Tensor) -> Tensor:
    """Return the product ``[T, blocks]`` of each token with its rows ``units`` ``[T, blocks]`` of a matrix."""
    rows = chosen_rows(matrix, units.reshape(-1)).view(*units.shape, -1)
    out = torch.bmm(rows, x.unsqueeze(2)).squeeze(2)
    return out if matrix.bias is None else out + matrix.bias[units]


def chosen_rows(matrix: Rows, units: Tensor) -> Tensor:
    """Return rows ``[n, columns]`` for ``units`` int64 ``[n]``; codes are decoded, in the dtype of the scales."""
    data = matrix.data.index_select(0, units)
    if matrix.scale is None:
        return data
    scale = matrix.scale.index_select(0, units)
    parts = data.view(*scale.shape, -1)
    if matrix.bits == 4:
        parts = torch.cat([parts & 15, parts >> 4], dim=-1).to(torch.int8) - 8
    return (parts.to(scale.dtype) * scale.unsqueeze(-1)).view(len(units), -1)
