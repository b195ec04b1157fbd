"""Launches of ``wide_kernel``, where it can run: Hopper, and weights of 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import is_aligned, launch
from ..common.splitk import parts_memory
from ..wna16 import wide as common
from .naive import HALF, PackedTensors


def supports(x: Tensor, weight: PackedTensors) -> bool:
    """Return True if the kernel reads such operands: ``x`` [M, in] with contiguous rows."""
    values, bits = weight.values, weight.bits
    return (
        weight.width == 16
        and x.dtype in (torch.bfloat16, torch.float16)
        and 2 * bits.shape[1] % (2 * HALF) == 0
        and is_aligned(values, bits)
        and common.is_usable(x.device)
    )


def product(x: Tensor, weight: PackedTensors, tiles: dict[str, Any]) -> Tensor:
    """Return ``x W^T + bias`` [M, out] for operands that the kernel ``supports``."""
    from .wide_kernel import SELECT, wide_kernel

    values, bits, bias, semaphores = weight.values, weight.bits, weight.bias, weight.semaphores
    assert semaphores is not None
    M, N, stored = x.shape[0], bits.shape[0], 2 * bits.shape[1]
    block_m, block_n, warps, ring = (tiles[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    count = -(-N // block_n) * -(-M // block_m)
    split = common.even_split(4 * stored, tiles["SPLIT"]) if count <= semaphores.numel() else 1
    staged = stage(x, 4 * stored)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = parts_memory(out, count, split, block_m * block_n, torch.float32)
    words = values.flatten()[: 2 * N * stored].view(torch.int32)
    added = words if bias is None else bias
    constants = {
        "HAS_BIAS": bias is not None, "SELECT": SELECT, "BLOCK_M": block_m, "BLOCK_N": block_n, "IS_SPLIT": split > 1,
        "RING": ring,
    }  # fmt: skip
    launch(
        wide_kernel, (count, split, 1),
        (staged, words, bits, added, out, partial, semaphores, M, N, stored, split), constants,
        num_warps=warps, num_stages=1,
        key=(x.dtype, added.dtype, bias is None, N, stored, split > 1, block_m, block_n, warps, ring,
             is_aligned(added)),
    )  # fmt: skip
    return out


def stage(x: Tensor, width: int) -> Tensor:
    """Return ``x`` [M, in] in the order of ``wide_kernel``: [M, width], zeros beyond its columns."""
    from .wide_kernel import stage_kernel

    (M, K), stride = x.shape, x.stride(0)
    out = torch.empty((M, width), dtype=x.dtype, device=x.device)
    launch(
        stage_kernel, (width // 256, M, 1), (x, out, K, stride, width), {}, num_warps=1, num_stages=1,
        key=(x.dtype, K, stride, width, is_aligned(x)),
    )  # fmt: skip
    return out
