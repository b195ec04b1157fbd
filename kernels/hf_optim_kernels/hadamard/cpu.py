"""Hadamard transforms on a CPU: sums and differences of halves, block by block."""

from __future__ import annotations

import torch
from torch import Tensor

from ..w8a8 import naive as w8a8
from .naive import check


def hadamard(x: Tensor, block: int) -> Tensor:
    """Return ``naive.hadamard``, up to the order of sums."""
    check(x, block)
    parts = (x if x.dtype == torch.float64 else x.float()).unflatten(-1, (-1, block))
    step = 1
    while step < block:
        first, second = parts.unflatten(-1, (-1, 2, step)).unbind(-2)
        parts = torch.stack([first + second, first - second], -2).flatten(-3)
        step *= 2
    return (parts.flatten(-2) * block**-0.5).to(x.dtype)


def hadamard_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return ``naive.hadamard_int8``, up to the order of sums."""
    codes, scales, _ = w8a8.quantize(hadamard(x, block), float8=False)
    return codes, scales
