"""The specification of ``hf_optim::sparse24`` in plain PyTorch.

Every four consecutive columns of a row of ``W`` [out, in] are a *four*, with at most two entries that are not zero
(Mishra et al., 2104.08378, section 3). A four is stored as two numbers, in the order of their columns, and four bits
that say which columns these are. The numbers are the weights themselves in 16 bits, or codes on a grid::

    W[n, k] = (code[n, k] - zero[g, n]) * scale[g, n],    g = k // group_size

with ``zero`` = ``middle`` where none is given. ``y = x W^T + bias`` is accumulated in float32 (float64 for float64
inputs) and rounded once, to the type of ``x``.

Codes of four bits have a second layout, see ``fragments``: int32 ``values`` say that it is that one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import mma_layout
from .groups24 import places

# Byte j of a chunk of 2 * HALF fours has the bits of four j in its low and of four HALF + j in its high half, so that
# a kernel reads both with one contiguous load.
HALF = 32


def stored_fours(columns: int) -> int:
    """The fours of a row that are stored: whole chunks; those past the end have no bit set."""
    return -(-columns // (8 * HALF)) * 2 * HALF


def pack(numbers: Tensor, kept: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Numbers [out, in] as ``(values, bits)``; those outside ``kept`` (bool, the same shape) are dropped.

    Args:
        numbers: weights of 16 bits (``width`` 16), or uint8 codes (``width`` 8, or 4 for codes below 16).

    ``values`` is [out, fours, 2], or for ``width`` 4 uint8 [out, fours] with the first code in the low half; ``bits``
    is uint8 [out, fours / 2], see ``HALF``.
    """
    rows, columns = numbers.shape
    fours = stored_fours(columns)
    first, second = places(kept)
    split = numbers.unflatten(-1, (-1, 4))
    low = torch.where(first == 0, split[..., 0], torch.where(first == 1, split[..., 1], split[..., 2]))
    high = torch.where(second == 3, split[..., 3], torch.where(second == 2, split[..., 2], split[..., 1]))
    values = torch.nn.functional.pad(torch.stack((low, high), -1), (0, 0, 0, fours - low.shape[1]))
    if width == 4:
        values = values[..., 0] | (values[..., 1] << 4)
    one = torch.ones((), dtype=torch.uint8, device=numbers.device)
    bits = torch.nn.functional.pad((one << first) | (one << second), (0, fours - low.shape[1]))
    halves = bits.view(rows, -1, 2, HALF)
    return values.contiguous(), (halves[:, :, 0] | (halves[:, :, 1] << 4)).reshape(rows, -1)


def shape_of(bits: Tensor) -> tuple[int, int]:
    """Rows of a packed weight, and its columns with those stored past the end."""
    if mma_layout.holds(bits):
        return mma_layout.ROWS * bits.shape[0], mma_layout.COLUMNS * bits.shape[1]
    return bits.shape[0], 8 * bits.shape[1]


def placed(bits: Tensor) -> Tensor:
    """Bool [out, fours, 4]: where the stored numbers of packed ``bits`` [out, fours / 2] belong."""
    chunks = bits.view(bits.shape[0], -1, 1, HALF)
    nibbles = torch.cat((chunks & 15, chunks >> 4), 2).reshape(bits.shape[0], -1, 1)
    return (nibbles >> torch.arange(4, dtype=torch.uint8, device=bits.device)) & 1 != 0


def unpack(values: Tensor, bits: Tensor, width: int, columns: int) -> tuple[Tensor, Tensor]:
    """The numbers [out, in] of a packed weight, 0 where none is stored, and bool [out, in]: where one is.

    ``values`` may be followed by other data (see ``library``).
    """
    if mma_layout.holds(values):
        return mma_layout.unpack(values, bits)
    rows, fours = bits.shape[0], 2 * bits.shape[1]
    if width == 4:
        stored = values.flatten()[: rows * fours].view(rows, fours)
        low, high = stored & 15, stored >> 4
    else:
        low, high = values.flatten()[: rows * fours * 2].view(rows, fours, 2).unbind(-1)
    at = placed(bits)
    second = torch.where(at[..., 0], high, low)
    third = torch.where(at[..., 3], low, high)
    numbers = torch.stack((low, second, third, high), -1)
    numbers = torch.where(at, numbers, torch.zeros((), dtype=numbers.dtype, device=numbers.device))
    return numbers.flatten(1)[:, :columns], at.flatten(1)[:, :columns]


def dequantize(
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    width: int,
    group_size: int,
    middle: int,
    columns: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The weight [out, in] in ``dtype``. ``scale`` and ``zero`` are [groups, out]; without scale, the numbers."""
    numbers, at = unpack(values, bits, width, columns)
    numbers = numbers.to(dtype)
    if scale is None:
        return numbers
    group = torch.arange(columns, device=bits.device) // group_size
    offset = float(middle) if zero is None else zero.to(dtype)[group].T
    weight = (numbers - offset) * scale.to(dtype)[group].T
    return torch.where(at, weight, torch.zeros((), dtype=dtype, device=bits.device))


def sparse24(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    width: int,
    group_size: int,
    middle: int,
) -> Tensor:
    """``x W^T + bias``: ``x`` [..., in], result [..., out] of the same type."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize(values, bits, scale, zero, width, group_size, middle, x.shape[-1], compute)
    y = x.to(compute) @ weight.T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)
