"""From tensors to the launch of a Hadamard transform."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.dense import as_rows
from ..common.launch import is_aligned, launch
from ..common.support import unsupported_dtype
from .kernel import hadamard_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_CHANNELS = 32768
"""Channels that a program holds in registers: a block, or a row that is quantized."""
OP = "hadamard"
DEFAULT = {"tile": 4096, "per_warp": 512}
"""Channels of a program that does not quantize, at most, unless a block has more, and channels of a warp."""


def unsupported(x: Tensor, block: int, quantize: bool = False) -> str | None:
    """Return why the kernel does not transform ``x``; None if it does."""
    held = triton.next_power_of_2(x.shape[-1]) if quantize else block
    if held > MOST_CHANNELS:
        return f"{held} channels at a time, at most {MOST_CHANNELS}"
    return unsupported_dtype(x.dtype, DTYPES)


def hadamard(x: Tensor, block: int, quantize: bool = False) -> tuple[Tensor, Tensor]:
    """Return ``naive.hadamard`` and an empty tensor; with ``quantize`` the results of ``naive.hadamard_int8``."""
    flat = as_rows(x)
    rows, channels = flat.shape
    out = torch.empty(x.shape, dtype=torch.int8 if quantize else x.dtype, device=x.device)
    scales = torch.empty(x.shape[:-1] if quantize else 0, dtype=torch.float32, device=x.device)
    eps = torch.finfo(x.dtype).eps
    if not rows or not channels:
        return out, scales.fill_(eps)
    count = channels // block
    every = triton.next_power_of_2(count)
    sizes = tuning.choose(OP, (channels, block), 1, x.dtype, x.device, lambda rows: DEFAULT)
    blocks = every if quantize else min(every, max(1, sizes["tile"] // block))
    constants = {
        "BLOCKS": blocks, "BLOCK": block, "STAGES": block.bit_length() - 1, "QUANTIZE": quantize, "EPS": eps,
    }  # fmt: skip
    warps = min(16, max(1, blocks * block // sizes["per_warp"]))
    key = (*constants.values(), warps, channels, flat.stride(0), flat.dtype, is_aligned(flat))
    args = (flat, out, scales if quantize else out, channels, flat.stride(0), block**-0.5)
    grid = (rows, -(-count // blocks), 1)
    launch(hadamard_kernel, grid, args, constants, num_warps=warps, num_stages=1, key=key, device=x.device)
    return out, scales
