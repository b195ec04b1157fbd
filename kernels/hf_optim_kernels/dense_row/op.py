"""The operators ``torch.ops.hf_optim.dense_row`` and ``dense_rows`` (see ``naive``). Importing this registers them.

On a CUDA device they run the Triton kernel, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernel). They have fake implementations, and no gradient: they are for decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import MOST_WEIGHTS, NO_ACT

DTYPES = (torch.bfloat16, torch.float16)
# The channels that a kernel's program holds; the least numbers of a weight for which a launch of its own is worth it.
MOST_CHANNELS, LEAST_NUMBERS = 32_768, 1 << 20


def unsupported(weight: Tensor, bias: Tensor | None) -> str | None:
    """Return why the operators do not take the weight and bias of a linear layer; None if they do."""
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
    _require_row(x, weight)
    if not can_run_triton(x):
        return naive.dense_row(x, weight, bias)
    from . import launch

    return launch.dense_row(_flat(x), weight, bias).view(*x.shape[:-1], -1)


@dense_row.register_fake
def _(x, weight, bias) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.custom_op("hf_optim::dense_rows", mutates_args=())
def dense_rows(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], act: int) -> list[Tensor]:
    """Return ``naive.dense_rows`` in one launch: each result ``[..., N_i]`` of one row ``x [..., K]``.

    Raises ``ValueError`` for another shape, or for a number of weights that a launch does not have.
    """
    _require_row(x, weights[0])
    wanted = (2,) if act != NO_ACT else range(1, MOST_WEIGHTS + 1)
    if len(weights) not in wanted or len(biases) not in (0, len(weights)):
        raise ValueError(f"{len(weights)} weights and {len(biases)} biases are not those of one launch")
    if not can_run_triton(x):
        return naive.dense_rows(x, weights, biases, act)
    from . import launch

    rows = launch.dense_rows(_flat(x), weights, biases, act)
    return [row.view(*x.shape[:-1], -1) for row in rows]


@dense_rows.register_fake
def _(x, weights, biases, act) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], each.shape[0])) for each in (weights if act == NO_ACT else weights[:1])]


def _require_row(x: Tensor, weight: Tensor) -> None:
    if x.shape[-1] != weight.shape[1] or x.numel() != weight.shape[1]:
        raise ValueError(f"one row of {weight.shape[1]} channels is multiplied, not {list(x.shape)}")


def _flat(x: Tensor) -> Tensor:
    row = x.reshape(-1)
    return row if row.stride(0) == 1 else row.contiguous()
