"""The operator ``torch.ops.hf_optim.dense_row`` (see ``naive``). Importing this module registers it.

On a CUDA device it runs the Triton kernel, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernel). It has a fake implementation, and no gradient: it is for decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive

DTYPES = (torch.bfloat16, torch.float16)
# The channels that a kernel's program holds; the least numbers of a weight for which a launch of its own is worth it.
MOST_CHANNELS, LEAST_NUMBERS = 32_768, 1 << 20


def unsupported(weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why the operator does not take the weight and bias of a linear layer; None if it does."""
    if weight.dtype not in DTYPES or (bias is not None and bias.dtype != weight.dtype):
        return f"a {weight.dtype} weight"
    if weight.ndim != 2 or not weight.is_contiguous() or weight.data_ptr() % 16:
        return "a weight whose rows do not follow each other"
    if weight.shape[1] % 8 or weight.shape[1] > MOST_CHANNELS:
        return f"{weight.shape[1]} channels"
    if weight.numel() < LEAST_NUMBERS:
        return "a small weight"
    return None


@torch.library.custom_op("hf_optim::dense_row", mutates_args=())
def dense_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x W^T + bias`` ``[..., N]`` of one row ``x [..., K]``. Raises ``ValueError`` for another shape."""
    if x.shape[-1] != weight.shape[1] or x.numel() != weight.shape[1]:
        raise ValueError(f"one row of {weight.shape[1]} channels is multiplied, not {list(x.shape)}")
    if not can_run_triton(x):
        return naive.dense_row(x, weight, bias)
    from . import launch

    row = x.reshape(-1)
    return launch.dense_row(row if row.stride(0) == 1 else row.contiguous(), weight, bias).view(*x.shape[:-1], -1)


@dense_row.register_fake
def _(x, weight, bias) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))
