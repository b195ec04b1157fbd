"""The specification of ``hf_optim::wna16`` in plain PyTorch.

A weight ``W`` [out, in] is stored as codes on a grid, one scale (and zero point) for every group of columns of a row::

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

with codes in [0, 2^width), width 4 or 8, and ``zero`` = 2^(width - 1) where none is given (a symmetric grid).
``y = x W^T + bias`` is accumulated in float32 (float64 for float64 inputs) and rounded once, to the type of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def half_chunk(group_size: int, width: int, columns: int) -> int:
    """How many columns the kernel takes together: they share a scale, unless groups are no multiple of 16."""
    largest = 64 if width == 4 else 128
    if group_size >= columns:
        return largest
    return next((size for size in (128, 64, 32, 16) if size <= largest and group_size % size == 0), 16)


def padded_columns(columns: int, group_size: int, width: int) -> int:
    """The columns that are stored: whole chunks, two halves each when two codes share a byte."""
    chunk = half_chunk(group_size, width, columns) * (2 if width == 4 else 1)
    return -(-columns // chunk) * chunk


def pack(codes: Tensor, width: int, group_size: int) -> Tensor:
    """Codes [out, in], integers in [0, 2^width), as uint8 [out, stored * width / 8].

    Width 8 stores them as they are. Width 4 puts two in a byte: of each chunk of ``2 h`` columns, byte ``j`` has
    column ``j`` in its low and column ``h + j`` in its high half, so that a kernel reads both halves of a chunk with
    contiguous loads of the input. Columns are padded with zeros to whole chunks.
    """
    rows, columns = codes.shape
    padding = padded_columns(columns, group_size, width) - columns
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding))
    if width == 8:
        return codes.contiguous()
    halves = codes.view(rows, -1, 2, half_chunk(group_size, width, columns))
    return (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def unpack(packed: Tensor, width: int, group_size: int, columns: int) -> Tensor:
    """The codes [out, in] (uint8) of a packed weight."""
    if width == 8:
        return packed[:, :columns]
    rows = packed.shape[0]
    bytes_ = packed.view(rows, -1, half_chunk(group_size, width, columns))
    return torch.stack((bytes_ & 15, bytes_ >> 4), dim=2).reshape(rows, -1)[:, :columns]


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
    codes = unpack(packed, width, group_size, columns).to(dtype)
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
