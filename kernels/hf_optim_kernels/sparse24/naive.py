"""The specification of ``hf_optim::sparse24`` in plain PyTorch.

Every four consecutive columns of a row of ``W`` [out, in] are a 2:4 group, with at most two entries that are not zero
(Mishra et al., 2104.08378, section 3). A group is stored as two numbers, in the order of their columns, and four bits
that mark these columns. The numbers are the weights themselves in 16 bits, or codes on a grid::

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

with ``zero`` = ``zero_offset`` where none is given. ``y = x W^T + bias`` is accumulated in float32 (float64 for float64
inputs) and rounded once, to the dtype of ``x``.

Codes of four bits have a second layout, ``mma_layout``, in which ``values`` are int32.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from . import mma_layout
from .groups24 import places

# Byte j of a k-tile of 2 * HALF groups has the bits of group j in its low and of group HALF + j in its high half, so
# that a kernel reads both with one contiguous load.
HALF = 32


class PackedTensors(NamedTuple):
    """A packed weight [out, in].

    Attributes:
        values: the two numbers of every 2:4 group, made by ``pack``; those of 16 bits have the dtype of the weight.
        bits: uint8 [out, groups24 / 2], made by ``pack``. int32, like ``values``, if ``mma_layout.pack`` made them
            (``width`` 4, whole tiles, groups for which ``mma_layout.supports_groups``).
        scale: [groups, out], floating point; None for weights of 16 bits.
        zero: [groups, out], whole numbers in [0, 255]; None where it is ``zero_offset``.
        bias: [out], or None.
        semaphores: int32, zeros, at least one for each tile of the output (``tiles.SEMAPHORES`` are enough). They count
            while the operator runs and are zero again afterwards, so the operator does not declare them as mutated. Two
            calls must not use the same ones at the same time: one layer, one stream. None where no kernel runs.
        width: 16, or the bits of a stored code, 8 or 4.
        group_size: columns that share a scale, a multiple of 4; ``in`` or more for one scale per row.
        zero_offset: the zero point where none is given.
    """

    values: Tensor
    bits: Tensor
    scale: Tensor | None
    zero: Tensor | None
    bias: Tensor | None
    semaphores: Tensor | None
    width: int
    group_size: int
    zero_offset: int


def stored_groups24(columns: int) -> int:
    """Return the stored 2:4 groups of a row: whole k-tiles; those past the end have no bit set."""
    return -(-columns // (8 * HALF)) * 2 * HALF


def pack(numbers: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Pack numbers [out, in] as ``(values, bits)``; those outside ``kept`` (bool, the same shape) are dropped.

    Args:
        numbers: weights of 16 bits (``width`` 16), or uint8 codes (``width`` 8, or 4 for codes below 16).

    ``values`` is [out, groups24, 2], or for ``width`` 4 uint8 [out, groups24] with the first code in the low half;
    ``bits`` is uint8 [out, groups24 / 2], see ``HALF``.
    """
    rows, columns = numbers.shape
    count = stored_groups24(columns)
    first, second = places(kept)
    split = numbers.unflatten(-1, (-1, 4))
    low = torch.where(first == 0, split[..., 0], torch.where(first == 1, split[..., 1], split[..., 2]))
    high = torch.where(second == 3, split[..., 3], torch.where(second == 2, split[..., 2], split[..., 1]))
    values = torch.nn.functional.pad(torch.stack((low, high), -1), (0, 0, 0, count - low.shape[1]))
    if width == 4:
        values = values[..., 0] | (values[..., 1] << 4)
    one = torch.ones((), dtype=torch.uint8, device=numbers.device)
    bits = torch.nn.functional.pad((one << first) | (one << second), (0, count - low.shape[1]))
    halves = bits.view(rows, -1, 2, HALF)
    return values.contiguous(), (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def shape_of(bits: Tensor) -> tuple[int, int]:
    """Return the rows of a packed weight, and its columns with those stored past the end."""
    if mma_layout.holds(bits):
        return mma_layout.ROWS * bits.shape[0], mma_layout.COLUMNS * bits.shape[1]
    return bits.shape[0], 8 * bits.shape[1]


def kept_columns(bits: Tensor) -> Tensor:
    """Return bool [out, groups24, 4]: the columns of the numbers that packed ``bits`` [out, groups24 / 2] belong to."""
    tiles = bits.view(bits.shape[0], -1, 1, HALF)
    nibbles = torch.cat((tiles & 15, tiles >> 4), 2).reshape(bits.shape[0], -1, 1)
    return (nibbles >> torch.arange(4, dtype=torch.uint8, device=bits.device)) & 1 != 0


def unpack(values: Tensor, bits: Tensor, width: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return the numbers [out, in] of a packed weight, 0 where none is stored, and bool [out, in]: where one is.

    ``values`` may be followed by other data (see ``cusparselt``).
    """
    if mma_layout.holds(values):
        return mma_layout.unpack(values, bits)
    rows, count = bits.shape[0], 2 * bits.shape[1]
    if width == 4:
        stored = values.flatten()[: rows * count].view(rows, count)
        low, high = stored & 15, stored >> 4
    else:
        low, high = values.flatten()[: rows * count * 2].view(rows, count, 2).unbind(-1)
    at = kept_columns(bits)
    second = torch.where(at[..., 0], high, low)
    third = torch.where(at[..., 3], low, high)
    numbers = torch.stack((low, second, third, high), -1)
    numbers = torch.where(at, numbers, torch.zeros((), dtype=numbers.dtype, device=numbers.device))
    return numbers.flatten(1)[:, :columns], at.flatten(1)[:, :columns]


def dequantize(weight: PackedTensors, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight [out, in] in ``dtype``; ``columns`` is ``in``. Without a scale, the numbers."""
    numbers, at = unpack(weight.values, weight.bits, weight.width, columns)
    numbers = numbers.to(dtype)
    if weight.scale is None:
        return numbers
    group = torch.arange(columns, device=numbers.device) // weight.group_size
    offset = float(weight.zero_offset) if weight.zero is None else weight.zero.to(dtype)[group].T
    dense = (numbers - offset) * weight.scale.to(dtype)[group].T
    return torch.where(at, dense, torch.zeros((), dtype=dtype, device=dense.device))


def sparse24(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``: ``x`` [..., in], result [..., out] of the same dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute) @ dequantize(weight, x.shape[-1], compute).T
    return (y if weight.bias is None else y + weight.bias.to(compute)).to(x.dtype)
