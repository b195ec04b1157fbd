"""Rows of 8-bit and 4-bit codes, each of which is decoded without the others.

A row is divided into groups of G columns (one group without a G), each with a scale ``max|w| / q``, q = 127 or 7, in
the dtype of the weights: ``w = code * scale``. 8-bit codes are int8 ``[rows, columns]``. 4-bit codes are stored plus 8,
two in a byte, uint8 ``[rows, columns / 2]``: byte k of a group holds column k in its low half and column k + G/2 in its
high half, so that both halves of a byte have one scale.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_CODE = {8: 127, 4: 7}


def encode_rows(weight: Tensor, bits: int, group: int | None) -> tuple[Tensor, Tensor]:
    """Return the codes of ``weight`` ``[rows, columns]`` and the scales ``[rows, groups]``."""
    rows, columns = weight.shape
    group = group or columns
    parts = weight.view(rows, columns // group, group)
    top = LARGEST_CODE[bits]
    largest = parts.abs().amax(-1)
    scale = torch.where(largest > 0, largest / top, torch.ones_like(largest))  # the one that is stored rounds, too
    codes = (parts.double() / scale.double().unsqueeze(-1)).round().clamp(-top, top)
    if bits == 8:
        return codes.to(torch.int8).view(rows, columns), scale
    low, high = (codes + 8).to(torch.uint8).chunk(2, dim=-1)
    return (low | (high << 4)).reshape(rows, columns // 2).contiguous(), scale


def decode_rows(codes: Tensor, scale: Tensor, bits: int) -> Tensor:
    """Return the weights ``[rows, columns]``, in the dtype of the scales ``[rows, groups]``."""
    rows, groups = scale.shape
    parts = codes.view(rows, groups, -1)
    if bits == 4:
        parts = torch.cat([parts & 15, parts >> 4], dim=-1).to(torch.int8) - 8
    return (parts.to(scale.dtype) * scale.unsqueeze(-1)).view(rows, -1)
