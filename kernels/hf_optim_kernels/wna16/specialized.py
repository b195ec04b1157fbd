"""Launches of ``specialized_kernel``: where ``wide_kernel`` can run, and codes of 4 or 8 bits lie whole."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.launch import launch
from ..common.launch_plan import prevent_recording
from ..common.splitk import parts_memory
from . import wide
from .naive import PackedTensors
from .wide import SLICE

# K-tiles of codes on their way; those of inputs are the configuration's.
RING = 3


def supports(x: Tensor, weight: PackedTensors) -> bool:
    """Return True if the kernel reads such operands: ``x`` [M, in] with contiguous rows."""
    return not weight.format and weight.packed.is_contiguous() and wide.supports(x, weight)


def product(x: Tensor, weight: PackedTensors, tiles: dict[str, Any]) -> Tensor:
    """Return ``x W^T + bias`` [M, out] for operands that the kernel ``supports``."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from .specialized_kernel import specialized_kernel

    packed, scale, zero, bias, semaphores, width, group_size, _, _ = weight
    if not supports(x, weight):
        raise ValueError("the specialized kernel of wna16 reads whole codes of 4 or 8 bits on a Hopper GPU")
    assert semaphores is not None
    prevent_recording()  # the address of x is in a descriptor
    (M, K), N = x.shape, packed.shape[1]
    block_m, block_n, x_ring = (tiles[n] for n in ("BLOCK_M", "BLOCK_N", "num_stages"))
    count = -(-N // block_n) * -(-M // block_m)
    split = wide.even_split(K, tiles["SPLIT"]) if 2 * count <= semaphores.numel() else 1
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = parts_memory(out, count, split, block_m * block_n, torch.float32)
    layout = gl.NVMMASharedLayout(128, 16, 2)
    inputs = TensorDescriptor(x, [M, K], [x.stride(0), 1], [block_m, SLICE], layout)
    codes = TensorDescriptor(packed, [packed.shape[0] * N, SLICE], [SLICE, 1], [block_n // 2, SLICE], layout)
    scales = wide.scales_per_unit(group_size, K)
    constants = {
        "GROUP": min(group_size, K), "SCALES": scales, "HAS_ZERO": zero is not None, "HAS_BIAS": bias is not None,
        "WIDTH": width, "MAGIC": wide.magic_of(width, x.dtype), "BLOCK_M": block_m, "BLOCK_N": block_n,
        "IS_SPLIT": split > 1, "X_RING": x_ring, "RING": RING,
    }  # fmt: skip
    others = scale if zero is None else zero, scale if bias is None else bias
    launch(
        specialized_kernel, (count, split, 1),
        (inputs, codes, scale, *others, out, partial, semaphores, M, N, K, split), constants,
        num_warps=tiles["num_warps"], num_stages=1, device=x.device,
        key=(x.dtype, scale.dtype, *(t.dtype for t in others), zero is None, bias is None, N, K, group_size, width,
             split > 1, block_m, block_n, x_ring, x.stride(0), wide.is_aligned(*others)),
    )  # fmt: skip
    return out
