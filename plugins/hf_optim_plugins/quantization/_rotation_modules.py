"""Linear layers whose input is rotated at run time, by Hadamard transforms of blocks of its channels.

This file is stored beside checkpoints whose inputs are rotated where no weight can take the rotation (behind an
activation function), so it imports only torch and transformers. The weight of the layer holds the same rotation:
``(x H) (W H)^T = x W^T``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from hf_optim.toolkit.modules import ReplacedModules

from ._hadamard_kernel import transform_by_kernel


def hadamard_blocks(x: Tensor, block: int) -> Tensor:
    """Return ``x`` with every ``block`` neighbouring channels times Sylvester's matrix over ``sqrt(block)``.

    ``x`` is ``[..., channels]``; ``block`` is a power of two that divides the channels. Sums are taken in float32 (in
    float64 for float64) and rounded once.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    parts = wide.unflatten(-1, (-1, block))
    step = 1
    while step < block:
        pairs = parts.unflatten(-1, (-1, 2, step))
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        parts = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return (parts.flatten(-2) * block**-0.5).to(x.dtype)


def rotated_input(x: Tensor, block: int, inverse: bool = False) -> Tensor:
    """Return ``x`` ``[..., channels]`` rotated by Hadamard transforms of ``block`` channels, a power of two.

    If blocks do not fill the channels, the first ``block`` channels are transformed, then the last ones; with
    ``inverse`` in the other order, which undoes it.
    """
    width = x.shape[-1]
    if width % block == 0:
        return _transformed(x, block)
    for last in (True, False) if inverse else (False, True):
        if last:
            x = torch.cat([x[..., : width - block], _transformed(x[..., width - block :], block)], -1)
        else:
            x = torch.cat([_transformed(x[..., :block], block), x[..., block:]], -1)
    return x


def _transformed(x: Tensor, block: int) -> Tensor:
    found = transform_by_kernel(x, block)
    return hadamard_blocks(x, block) if found is None else found


class RotatedInput(nn.Module):
    """A linear layer whose input is rotated first. ``inner`` is the layer; for ``block`` see ``rotated_input``."""

    def __init__(self, inner: nn.Module, block: int) -> None:
        super().__init__()
        self.inner, self.block = inner, block

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(rotated_input(x, self.block))

    def extra_repr(self) -> str:
        return f"block={self.block}"

    @torch.no_grad()
    def to_dense(self) -> tuple[nn.Module, bool]:
        """Return the stock layer, its weight rotated back, and True: it computes the same."""
        weight: Any = self.inner.weight
        transposed = isinstance(self.inner, Conv1D)
        stock = rotated_input(weight.T if transposed else weight, self.block, inverse=True)
        weight.copy_(stock.T if transposed else stock)
        return self.inner, True


class RotatedInputModel(ReplacedModules):
    """Base of a model class in which the linear layers named in ``config.rotated_inputs`` rotate their input."""

    replaced_field = "rotated_inputs"

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        return RotatedInput(module, entry["block"])
