"""``XᵀX``, summed batch by batch.

On CUDA, 16-bit inputs are multiplied by the tensor cores as they are: a product of two bfloat16 or float16 numbers is
exact in float32, and sums are kept in float32. Inputs of other types are converted to the type of the sum a few rows at
a time and multiplied in it; for float32 that is torch's float32 product, full precision unless TF32 was allowed.

Of the sum only the panels on and above the diagonal are computed there, nearly half the work; ``mirror_`` fills the
rest. On a CPU all of it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Columns of a panel; rows converted at a time.
PANEL, ROWS = 2048, 4096
_MIXED = hasattr(torch.ops.aten.mm, "dtype")  # torch.mm with an out_dtype of its own: 2.8 and later


def accumulate_(total: Tensor, rows: Tensor) -> None:
    """``total += rowsᵀ rows``; on an accelerator, of panels from the diagonal to the right.

    Args:
        total: ``[width, width]``, float32 or float64.
        rows: ``[tokens, width]``, any float type, on the same device.
    """
    if total.device.type == "cpu":
        wide = rows.to(total.dtype)
        total.addmm_(wide.T, wide)
    elif rows.is_cuda and _MIXED and total.dtype == torch.float32 and rows.dtype in (torch.bfloat16, torch.float16):
        for begin in range(0, len(total), PANEL):
            left, right = rows[:, begin : begin + PANEL], rows[:, begin:]
            total[begin : begin + PANEL, begin:] += torch.mm(left.T, right, out_dtype=torch.float32)
    else:
        for part in rows.split(ROWS):
            accumulate_panels_(total, part.to(total.dtype))


def accumulate_panels_(total: Tensor, rows: Tensor) -> None:
    """``total += rowsᵀ rows`` of one type, panels from the diagonal to the right only."""
    for begin in range(0, len(total), PANEL):
        total[begin : begin + PANEL, begin:].addmm_(rows[:, begin : begin + PANEL].T, rows[:, begin:])


def mirror_(total: Tensor) -> None:
    """Fill what ``accumulate_`` left out; nothing on a CPU."""
    if total.device.type != "cpu":
        mirror_panels_(total)


def mirror_panels_(total: Tensor) -> None:
    """Copy the panels above the diagonal to below it."""
    for begin in range(0, len(total), PANEL):
        end = begin + PANEL
        total[end:, begin:end] = total[begin:end, end:].T
