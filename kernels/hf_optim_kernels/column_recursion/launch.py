"""The recursion over all columns: per block, one launch of the kernel and one product that updates later columns.

That product is ``torch.addmm`` of float32, in the precision that torch is set to (full float32 by default).
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
from torch import Tensor

from .kernel import block_kernel

# A tile in registers: 32 rows of 128 columns are 32 numbers per thread.
_ROWS, _WARPS = 32, 4
MOST_COLUMNS = 256


def recurse(
    weight: Tensor, upper: Tensor, order: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, low: float,
    high: float, block_size: int = 128, start: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return the codes of ``naive.recurse``, up to the order of reduction, computed in float32.

    Args:
        block_size: columns of a block, at most ``MOST_COLUMNS``.
        start: ``[rows, columns]``, the values to begin with; None for ``weight``.

    Raises ``ValueError`` unless ``upper`` and ``scale`` are float32.
    """
    if upper.dtype != torch.float32 or scale.dtype != torch.float32:
        raise ValueError(f"the column recursion is computed in float32, not {upper.dtype}")
    rows, columns = weight.shape
    rest = (weight if start is None else start).index_select(1, order).float()
    codes = torch.empty(rows, columns, dtype=torch.int8, device=weight.device)
    places, block_size = order.to(torch.int32), min(block_size, MOST_COLUMNS, columns)
    zeros = scale if zero is None else zero
    tensors = (weight.contiguous(), upper.contiguous(), places, scale.contiguous(), zeros.contiguous(), codes)
    constants = {
        "LOW": float(low), "HIGH": float(high), "HAS_ZERO": zero is not None, "BLOCK_R": _ROWS,
        "BLOCK_C": max(16, triton.next_power_of_2(block_size)),
    }  # fmt: skip
    grid = (triton.cdiv(rows, _ROWS),)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        for begin in range(0, columns, block_size):
            end = min(begin + block_size, columns)
            errors = torch.empty(rows, end - begin, dtype=torch.float32, device=weight.device)
            numbers = (begin, end - begin, rows, columns, scale.shape[1], group_size)
            block_kernel[grid](rest, *tensors, errors, *numbers, **constants, num_warps=_WARPS)
            rest[:, end:].addmm_(errors, tensors[1][begin:end, end:], alpha=-1)
    return codes
