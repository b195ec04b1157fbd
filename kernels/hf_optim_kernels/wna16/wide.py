"""Launches of ``wide_kernel``, where it can run: Hopper, with the scales and shapes that it reads."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..common.launch import is_aligned, launch
from ..common.splitk import parts_memory
from . import float4
from .naive import PackedTensors, slice_columns

log = logging.getLogger(__name__)
# Raised for a device that is in an error state, from torch 2.8 on.
_DEVICE_ERRORS = tuple(filter(None, [getattr(torch, "AcceleratorError", None)]))

UNIT, SLICE = 256, 64
# What the assembly leaves added to a code of eight bits: it subtracts 128 by itself.
BYTE_MAGIC = -128
_HALVES = {torch.bfloat16: ("bf16", 128), torch.float16: ("fp16", 1024)}


@functools.cache
def is_available(device: torch.device) -> bool:
    """Return True if the kernel can be compiled for ``device``: Gluon, and warp-group instructions (Hopper)."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] != 9:
        return False
    try:
        from . import wide_kernel  # noqa: F401
    except Exception as error:  # Gluon is experimental: another Triton may lack any part of it
        log.info("kernels in Triton's Gluon are not used: %s", error)
        return False
    return True


_FAILED: set[torch.device] = set()


def is_usable(device: torch.device) -> bool:
    """Return True if the kernel may run on ``device``: it is available, and did not fail to compile."""
    return is_available(device) and _numbered(device) not in _FAILED


def _numbered(device: torch.device) -> torch.device:
    """Return ``device``; ``cuda`` alone with the number of the current device, as tensors name it."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def attempt(product: Callable[[], Tensor], device: torch.device) -> Tensor | None:
    """Return ``product()``; None, and from then on no kernel of this kind on ``device``, if it cannot be compiled.

    Gluon is experimental: a Triton with another version of it should cost speed, not the packed layer.
    """
    try:
        return product()
    except (torch.cuda.OutOfMemoryError, *_DEVICE_ERRORS):
        raise
    except Exception as error:
        _FAILED.add(_numbered(device))
        warnings.warn(f"kernels in Triton's Gluon are not used on {device}: {error}", stacklevel=2)
        return None


def supports(x: Tensor, weight: PackedTensors) -> bool:
    """Return True if the kernel reads such operands: ``x`` [M, in] with contiguous rows."""
    K, N = x.shape[1], weight.packed.shape[1]
    is_grouped = weight.group_size < K
    return (
        x.dtype in _HALVES
        and (weight.format != float4.MXFP4 or x.dtype == torch.bfloat16)
        and K % SLICE == 0
        and N % 16 == 0
        and x.stride(0) % 8 == 0
        and (bool(weight.format) or slice_columns(weight.group_size, K) == SLICE)
        and (not is_grouped or bool(weight.format) or weight.scale.dtype == x.dtype)
        and (not is_grouped or weight.zero is None or weight.zero.dtype == torch.uint8)
        and is_aligned(x, weight.packed, weight.scale)
        and is_usable(x.device)
    )


def even_split(K: int, split: int) -> int:
    """Return the largest split up to ``split`` with which every part has a unit of columns."""
    units = -(-K // UNIT)
    each = -(-units // min(split, units))
    return -(-units // each)


def magic_of(width: int, dtype: torch.dtype) -> int:
    """Return what the assembly leaves added to a code, before it adds minus the zero point and this."""
    return _HALVES[dtype][1] if width == 4 else BYTE_MAGIC


def product(x: Tensor, weight: PackedTensors, tiles: dict[str, Any]) -> Tensor:
    """Return ``x W^T + bias`` [M, out] for operands that the kernel ``supports``."""
    from .wide_kernel import ASSEMBLY, FLOAT_ASSEMBLY, wide_kernel

    packed, scale, zero, bias, semaphores, width, group_size, format, divisor = weight
    assert semaphores is not None
    (M, K), N = x.shape, packed.shape[1]
    block_m, block_n, warps, ring = (tiles[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    count = -(-N // block_n) * -(-M // block_m)
    split = even_split(K, tiles["SPLIT"]) if count <= semaphores.numel() else 1
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = parts_memory(out, count, split, block_m * block_n, torch.float32)
    half, _ = _HALVES[x.dtype]
    if format:
        scales, zero = SLICE // group_size, None
        assembly = tuple(FLOAT_ASSEMBLY[format, part, half] for part in range(4))
    else:
        scales = scales_per_unit(group_size, K)
        assembly = tuple(ASSEMBLY[width, part, half, scales > 0, zero is not None] for part in range(16 // width))
    constants = {
        "GROUP": min(group_size, K), "SCALES": scales, "HAS_ZERO": zero is not None, "HAS_BIAS": bias is not None,
        "WIDTH": width, "DECODE": assembly,
        "MAGIC": magic_of(width, x.dtype), "BLOCK_M": block_m, "BLOCK_N": block_n, "IS_SPLIT": split > 1,
        "RING": ring, "FORMAT": format,
    }  # fmt: skip
    zero = divisor if format else zero
    others = scale if zero is None else zero, scale if bias is None else bias
    stride = x.stride(0)
    launch(
        wide_kernel, (count, split, 1),
        (x, packed, scale, *others, out, partial, semaphores, M, N, K, stride, packed.stride(0), split), constants,
        num_warps=warps, num_stages=1,
        key=(x.dtype, format, scale.dtype, *(t.dtype for t in others), zero is None, bias is None, N, K, stride,
             group_size, width, split > 1, block_m, block_n, warps, ring, is_aligned(*others)),
    )  # fmt: skip
    return out


def scales_per_unit(group_size: int, K: int) -> int:
    """Return how many scales a row has in a unit of columns; 0 for one scale per row."""
    if group_size >= K:
        return 0
    return next(count for count in (1, 2, 4) if group_size % (UNIT // count) == 0)
