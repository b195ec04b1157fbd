"""Gram matrices ``XᵀX``, accumulated batch by batch.

On CUDA, 16-bit inputs are multiplied by the tensor cores without conversion: a product of two bfloat16 or float16
numbers is exact in float32, and sums are kept in float32. Inputs of other dtypes are converted to the dtype of the sum,
a few rows at a time, and multiplied in it; for float32 this is torch's float32 product, in full precision unless TF32
is enabled.

On accelerators only the panels on and above the diagonal are computed, which saves nearly half the work; ``mirror_``
fills the rest. On a CPU the whole matrix is computed.
"""

from __future__ import annotations

import torch
from torch import Tensor

PANEL, ROWS = 2048, 4096  # columns of a panel; rows converted at a time
_HALVES = (torch.bfloat16, torch.float16)
_MIXED = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm accepts an out_dtype from 2.8 on


def accumulate_(total: Tensor, rows: Tensor, single: bool = False) -> None:
    """Compute ``total += rowsᵀ rows``; on an accelerator only the panels on and above the diagonal.

    Args:
        total: ``[width, width]``, float32 or float64.
        rows: ``[tokens, width]``, any floating dtype, on the same device.
        single: on CUDA, multiply 16-bit rows on the tensor cores for a float64 sum, too: the product of these rows has
            the precision of float32, and the sum with the others that of float64.
    """
    if total.device.type == "cpu":
        wide = rows.to(total.dtype)
        total.addmm_(wide.T, wide)
    elif rows.is_cuda and _MIXED and rows.dtype in _HALVES and (single or total.dtype == torch.float32):
        for begin in range(0, len(total), PANEL):
            left, right = rows[:, begin : begin + PANEL], rows[:, begin:]
            total[begin : begin + PANEL, begin:] += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        for part in rows.split(ROWS):
            accumulate_panels_(total, part.to(total.dtype))


def accumulate_panels_(total: Tensor, rows: Tensor) -> None:
    """Compute the panels on and above the diagonal of ``total += rowsᵀ rows``, both of one dtype."""
    for begin in range(0, len(total), PANEL):
        total[begin : begin + PANEL, begin:].addmm_(rows[:, begin : begin + PANEL].T, rows[:, begin:])


def mirror_(total: Tensor) -> None:
    """Fill the part that ``accumulate_`` leaves out; does nothing on a CPU."""
    if total.device.type != "cpu":
        mirror_panels_(total)


def mirror_panels_(total: Tensor) -> None:
    """Copy the panels above the diagonal to below it."""
    for begin in range(0, len(total), PANEL):
        end = begin + PANEL
        total[end:, begin:end] = total[begin:end, end:].T
