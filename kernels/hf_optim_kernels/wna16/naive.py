"""The specification of ``hf_optim::wna16`` in plain PyTorch.

A weight ``W`` [out, in] is stored as codes on a grid, with one scale (and zero point) for every group of columns of a
row::

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

with codes in [0, 2^width), width 4 or 8, and ``zero`` = 2^(width - 1) where none is given (a symmetric grid).
Or the numbers are 4-bit floats (``float4``) with scales of 8 bits, ``W[n, k] = number[n, k] * scale[g, n] /
divisor[n]``.

``y = x W^T + bias`` is accumulated in float32 (float64 for float64 inputs) and rounded once, to the dtype of ``x``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import float4

WORD = 16
MAX_SLICE = 64


class PackedTensors(NamedTuple):
    """A packed weight [out, in].

    Attributes:
        packed: int16 [k-tiles, out, slice], made by ``pack``.
        scale: [groups, out], floating point; of 4-bit floats int32 [k-tiles, out, words], see ``float4``.
        zero: [groups, out], whole numbers in [0, 2^width), of any dtype; None for the symmetric grid.
        bias: [out], or None.
        semaphores: int32 split-k semaphores, zeros before and after a call; the specification does not read them.
        width: bits of a stored code, 4 or 8.
        group_size: columns that share a scale: a multiple of 16, or ``in`` or more for one scale per row.
        format: the kind of numbers, ``float4.INTEGER``, ``NVFP4`` or ``MXFP4``.
        divisor: float32 [out], of NVFP4; otherwise None.
    """

    packed: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    semaphores: Tensor | None
    width: int
    group_size: int
    format: int = float4.INTEGER
    divisor: Tensor | None = None


def slice_columns(group_size: int, columns: int) -> int:
    """Return the columns of a k-slice: what one product of the kernel multiplies. They share a scale.

    Raises ``ValueError`` if the group size is not a multiple of 16 (and not the whole row).
    """
    if group_size >= columns:
        return MAX_SLICE
    if group_size % 16:
        raise ValueError(f"group size {group_size} is not a multiple of 16")
    return next(size for size in (MAX_SLICE, 32, 16) if group_size % size == 0)


def tile_columns(group_size: int, width: int, columns: int) -> int:
    """Return the columns that are stored together, a k-tile: a slice for each code of a 16-bit word."""
    return slice_columns(group_size, columns) * (WORD // width)


def slices_per_scale(group_size: int, width: int, columns: int) -> int:
    """Return how many consecutive slices of a k-tile have one scale: a power of two."""
    slices = WORD // width
    if group_size >= columns:
        return slices
    held = group_size // slice_columns(group_size, columns)
    return next(count for count in (slices, slices // 2, 1) if held % count == 0)


def pack(codes: Tensor, width: int, group_size: int, format: int = float4.INTEGER) -> Tensor:
    """Pack codes [out, in], integers in [0, 2^width), as int16 [k-tiles, out, slice].

    A word holds the codes of ``16 / width`` columns that are a slice apart: bits ``s * width`` and up of word ``j``
    belong to column ``s * slice + j`` of the k-tile. So the words of a tile become one operand of the tensor cores per
    slice with a mask and no shuffle, two words to a register. Columns are padded with zeros to whole k-tiles. The rows
    of a k-tile are contiguous: a program reads its tile as one block. The bits of 4-bit floats are placed as ``float4``
    says.
    """
    rows, columns = codes.shape
    size, slices = float4.SLICE if format else slice_columns(group_size, columns), WORD // width
    padding = -columns % (size * slices)
    codes = torch.nn.functional.pad(codes.to(torch.uint8), (0, padding)).view(rows, -1, slices, size)
    words = torch.zeros(rows, codes.shape[1], size, dtype=torch.int32, device=codes.device)
    for index in range(slices):
        own = codes[:, :, index]
        words |= float4.place_bits(own, index) if format else own.to(torch.int32) << (index * width)
    # Two's complement: words from 2^15 on are negative.
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16).transpose(0, 1).contiguous()


def unpack(packed: Tensor, width: int, columns: int, format: int = float4.INTEGER) -> Tensor:
    """Return the codes [out, in] (uint8) of packed words."""
    rows = packed.shape[1]
    words = packed.transpose(0, 1).to(torch.int32) & 0xFFFF
    if format:
        slices = [float4.take_bits(words, index) for index in range(4)]
    else:
        slices = [(words >> shift) & ((1 << width) - 1) for shift in range(0, WORD, width)]
    return torch.stack(slices, dim=2).to(torch.uint8).reshape(rows, -1)[:, :columns]


def dequantize(weight: PackedTensors, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [out, in] in ``dtype``; ``columns`` is ``in``."""
    codes = unpack(weight.packed, weight.width, columns, weight.format)
    group = torch.arange(columns, device=codes.device) // weight.group_size
    if weight.format:
        bytes_ = float4.unpack_scales(weight.scale, weight.format, -(-columns // weight.group_size))
        scale = float4.scale_numbers(bytes_, weight.format, dtype)
        scale = scale if weight.divisor is None else scale / weight.divisor.to(dtype)[:, None]
        return float4.numbers(codes, dtype) * scale[:, group]
    codes = codes.to(dtype)
    offset = 2.0 ** (weight.width - 1) if weight.zero is None else weight.zero.to(dtype)[group].T
    return (codes - offset) * weight.scale.to(dtype)[group].T


def wna16(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``: ``x`` [..., in], result [..., out] of the same dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute) @ dequantize(weight, x.shape[-1], compute).T
    return (y if weight.bias is None else y + weight.bias.to(compute)).to(x.dtype)
