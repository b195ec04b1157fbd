"""The specification of Hadamard transforms in plain PyTorch.

A row ``x`` ``[channels]`` is cut into blocks of ``block`` neighbouring channels, ``block`` a power of two that divides
the channels, and each is multiplied by Sylvester's matrix::

    y = x H / sqrt(block),     H_1 = [1],     H_2n = [[H_n, H_n], [H_n, -H_n]],     H[i, j] = (-1)^popcount(i & j)

Sums are float32 (float64 for float64), rounded once to the dtype of ``x``. H is symmetric and its own inverse up to the
factor. The quantized form rounds ``y`` per row to int8, as ``w8a8.naive.quantize`` does: ``s = max|y| / 127.5``, codes
``clamp(round(y / s), -128, 127)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..w8a8 import naive as w8a8


def matrix(block: int) -> Tensor:
    """Return Sylvester's matrix, float64 ``[block, block]`` of 1 and -1."""
    index = torch.arange(block)
    common = index[:, None] & index[None, :]
    parity = torch.zeros_like(common)
    while bool(common.any()):
        parity ^= common & 1
        common = common >> 1
    return 1.0 - 2.0 * parity.double()


def check(x: Tensor, block: int) -> None:
    """Raise ``ValueError`` for a block that is not a power of two, or does not divide the channels of ``x``."""
    if block < 1 or block & (block - 1) or x.shape[-1] % block:
        raise ValueError(f"a block of {block} channels is not a power of two that divides {x.shape[-1]}")


def hadamard(x: Tensor, block: int) -> Tensor:
    """Return the transform of ``x`` ``[..., channels]``, in its shape and dtype."""
    check(x, block)
    wide = x if x.dtype == torch.float64 else x.float()
    parts = wide.unflatten(-1, (x.shape[-1] // block, block))
    return (parts @ matrix(block).to(wide) * block**-0.5).flatten(-2).to(x.dtype)


def hadamard_int8(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return codes int8 ``[..., channels]`` and scales float32 ``[...]`` of the transformed rows."""
    codes, scales, _ = w8a8.quantize(hadamard(x, block), float8=False)
    return codes, scales
