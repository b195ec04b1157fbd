"""The largest numbers of short rows in one launch, as a router of a decoding step chooses its experts.

PyTorch's ``topk`` takes two launches, a selection and a sort, each longer than the row takes to read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import is_aligned, launch
from ..common.support import can_run_triton

# Rows and columns up to which it is used, and numbers that are chosen: each takes one more pass over a row.
MOST_ROWS, MOST_COLUMNS, MOST_CHOSEN = 64, 1024, 32
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _choose_kernel(x, values, indices, N, x_row, CHOSEN: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the CHOSEN largest numbers of a row of N in descending order, and where they stand; NaN is the largest."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    inside = column < N
    number = tl.load(x + row * x_row + column, mask=inside, other=0.0).to(tl.float32) + 0.0
    bits = number.to(tl.int32, bitcast=True)
    # Ordered as integers: the bits of negative numbers descend.
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(number != number, 0x7FFFFFFF, key)
    # Of equal numbers the first counts.
    order = (key.to(tl.int64) << 32) | (COLUMNS - column).to(tl.int64)
    order = tl.where(inside, order, -0x7FFFFFFFFFFFFFFF)
    for choice in tl.static_range(CHOSEN):
        best = tl.max(order, axis=0)
        where = COLUMNS - (best & 0xFFFFFFFF)
        tl.store(indices + row * CHOSEN + choice, where)
        tl.store(values + row * CHOSEN + choice, tl.load(x + row * x_row + where))
        order = tl.where(order == best, -0x7FFFFFFFFFFFFFFF, order)


def takes(x: Tensor, k: int) -> bool:
    """Return True if ``choose`` is meant for the ``k`` largest numbers of the rows of ``x``."""
    if x.dim() != 2 or x.dtype not in DTYPES or not (isinstance(x.shape[0], int) and isinstance(x.shape[1], int)):
        return False
    return 0 < x.shape[0] <= MOST_ROWS and 0 < k <= min(MOST_CHOSEN, x.shape[1]) and x.shape[1] <= MOST_COLUMNS


@torch.library.custom_op("hf_optim::choose", mutates_args=())
def choose(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the ``k`` largest numbers of each row of ``x`` [T, E] in descending order, and their columns, int64.

    NaN counts as the largest number, as in ``torch.topk``. Of equal numbers the first comes first.
    """
    if not can_run_triton(x):
        values, indices = torch.sort(x, dim=1, descending=True, stable=True)
        return values[:, :k].contiguous(), indices[:, :k].contiguous()
    x = x if x.stride(1) == 1 else x.contiguous()
    values, indices = x.new_empty(len(x), k), torch.empty((len(x), k), dtype=torch.int64, device=x.device)
    constants = {"CHOSEN": k, "COLUMNS": max(16, triton.next_power_of_2(x.shape[1]))}
    numbers = (x.shape[1], x.stride(0))
    launch(
        _choose_kernel, (len(x), 1, 1), (x, values, indices, *numbers), constants, num_warps=1, num_stages=1,
        key=(x.dtype, is_aligned(x), *(1 if n == 1 else n % 16 == 0 for n in numbers), *constants.values()),
    )  # fmt: skip
    return values, indices


@choose.register_fake
def _(x, k) -> tuple[Tensor, Tensor]:
    return x.new_empty((x.shape[0], k)), x.new_empty((x.shape[0], k), dtype=torch.int64)
