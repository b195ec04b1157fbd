"""The specification of ``hf_optim::wna16`` in plain PyTorch.

A weight ``W`` [out, in] is stored as codes on a grid, one scale (and zero point) for every group of columns of a row::

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

with codes in [0, 2^width), width 4 or 8, and ``zero`` = 2^(width - 1) where none is given (a symmetric grid).
``y = x W^T + bias`` is accumulated in float32 (float64 for float64 inputs) and rounded once, to the type of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 16
LARGEST_PLANE = 64


def plane(group_size: int, columns: int) -> int:
    """Columns of a plane: what one product of the kernel takes; they share a scale.

    Raises ``ValueError`` where groups are no multiple of 16 columns (and not the whole row).
    """
    if group_size >= columns:
        return LARGEST_PLANE
    if group_size % 16:
        raise ValueError(f"groups of {group_size} columns; the layout has multiples of 16")
    return next(size for size in (LARGEST_PLANE, 32, 16) if group_size % size == 0)


def chunk(group_size: int, width: int, columns: int) -> int:
    """Columns that are stored together: a plane for each code of a 16-bit word."""
    return plane(group_size, columns) * (WORD // width)


def sharing(group_size: int, width: int, columns: int) -> int:
    """How many consecutive planes of a chunk have one scale: a power of two."""
    planes = WORD // width
    if group_size >= columns:
        return planes
    held = group_size // plane(group_size, columns)
    return next(count for count in (planes, planes // 2, 1) if held % count == 0)


def pack(codes: Tensor, width: int, group_size: int) -> Tensor:
    """Codes [out, in], integers in [0, 2^width), as int16 [chunks, out, plane].

    A word holds the codes of ``16 / width`` columns that stand a plane apart: bits ``p * width`` and up of word ``j``
    belong to column ``p * plane + j`` of the chunk. So the words of a tile become one operand of the tensor cores per
    plane with a mask and no shuffle, two words to a register. Columns are padded with zeros to whole chunks. A chunk's
    rows are contiguous: a program reads its tile as one block.
    """
    rows, columns = codes.shape
    size, planes = plane(group_size, columns), WORD // width
    padding = -columns % (size * planes)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding)).view(rows, -1, planes, size)
    words = torch.zeros(rows, codes.shape[1], size, dtype=torch.int32, device=codes.device)
    for index in range(planes):
        words |= codes[:, :, index].to(torch.int32) << (index * width)
    # Two's complement: words from 2^15 on are negative.
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).transpose(0, 1).contiguous()


def unpack(packed: Tensor, width: int, columns: int) -> Tensor:
    """The codes [out, in] (uint8) of a packed weight."""
    rows = packed.shape[1]
    words = packed.transpose(0, 1).to(torch.int32) & 0xFFFF
    planes = [(words >> shift) & ((1 << width) - 1) for shift in range(0, WORD, width)]
    return torch.stack(planes, dim=2).to(torch.uint8).reshape(rows, -1)[:, :columns]


def dequantize(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    width: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] in ``dtype``. ``scale`` and ``zero`` are [groups, out]."""
    codes = unpack(packed, width, columns).to(dtype)
    group = torch.arange(columns, device=packed.device) // group_size
    offset = 2.0 ** (width - 1) if zero is None else zero.to(dtype)[group].T
    return (codes - offset) * scale.to(dtype)[group].T


def wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    width: int,
    group_size: int,
) -> Tensor:
    """``x W^T + bias``: ``x`` [..., in], result [..., out] of the same type."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize(packed, scale, zero, width, group_size, x.shape[-1], compute)
    y = x.to(compute) @ weight.T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)
