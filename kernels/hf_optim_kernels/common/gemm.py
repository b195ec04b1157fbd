"""Common parts of products of codes for many rows: the order of tiles, tensor descriptors, and persistent programs.

A configuration names its kernel: ``grouped`` has one program per tile of the result, ``persistent`` as many as run at a
time, each with one tile after the other, which reads through tensor descriptors (TMA; compute capability 9.0).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import is_aligned
from .launch_plan import prevent_recording

# For operands that tensor descriptors cannot read: less shared memory than on the cards that read them.
WITHOUT_DESCRIPTORS = {"KERNEL": "grouped", "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 4, "num_stages": 3}
# The multiprocessor count where Triton interprets.
_INTERPRETED_PROGRAMS = 3


@triton.jit
def swizzled(tile, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr):
    """Return (block of rows, block of columns) of a tile number, GROUP blocks of rows together for the L2 cache."""
    down = tl.cdiv(M, BLOCK_M)
    in_group = GROUP * tl.cdiv(N, BLOCK_N)
    first = tile // in_group * GROUP
    height = tl.minimum(down - first, GROUP)
    return first + tile % in_group % height, tile % in_group // height


class Schedule(NamedTuple):
    """How a product is launched.

    Attributes:
        is_persistent: which of the two kernels.
        programs: the size of the grid.
        constants: the kernel's last constexpr parameters.
        options: ``num_warps`` and ``num_stages``.
    """

    is_persistent: bool
    programs: int
    constants: dict[str, Any]
    options: dict[str, int]


def schedule(tiles: dict[str, Any], x: Tensor, weight: Tensor, semaphores: int) -> Schedule:
    """Return the schedule of a configuration for codes ``x`` [M, in] and ``weight`` [out, in].

    The columns of a tile are shared only if there are as many ``semaphores`` as tiles.
    """
    tiles = readable_tiles(tiles, x, weight)
    block = {name: tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    count = -(-x.shape[0] // block["BLOCK_M"]) * -(-weight.shape[0] // block["BLOCK_N"])
    options = {name: tiles[name] for name in ("num_warps", "num_stages")}
    if tiles["KERNEL"] != "persistent":
        parts = even_parts(x.shape[1], block["BLOCK_K"], tiles["PARTS"]) if count <= semaphores else 1
        return Schedule(False, count, {"EVEN": x.shape[1] % block["BLOCK_K"] == 0, "PARTS": parts, **block}, options)
    set_descriptor_allocator()
    programs = multiprocessor_count(x.device)
    flags: dict[str, Any] = {name: bool(tiles[name]) for name in ("FLATTEN", "HALVES") if name in tiles}
    return Schedule(True, min(count, programs), {"PROGRAMS": programs, **flags, **block}, options)


def even_parts(columns: int, block: int, parts: int) -> int:
    """Return the largest number up to ``parts`` with which every part has a block of columns."""
    steps = -(-columns // block)
    each = -(-steps // min(parts, steps))
    return -(-steps // each)


def readable_tiles(tiles: dict[str, Any], x: Tensor, weight: Tensor) -> dict[str, Any]:
    """Return the configuration, or one without tensor descriptors where they cannot read the operands."""
    if tiles["KERNEL"] == "grouped" or can_use_descriptors(x, weight):
        return tiles
    is_large = tiles["BLOCK_M"] * tiles["BLOCK_N"] > 128 * 128
    return tiles | (WITHOUT_DESCRIPTORS if is_large else {"KERNEL": "grouped"})


def can_use_descriptors(x: Tensor, weight: Tensor) -> bool:
    """Return True if tensor descriptors can read both: by the hardware, and rows begin at multiples of 16 bytes."""
    if x.shape[1] % 16 or not is_aligned(x, weight):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


@functools.cache
def multiprocessor_count(device: torch.device) -> int:
    """Return the number of multiprocessors of a device; a few in the interpreter."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count


def set_descriptor_allocator() -> None:
    """Give the next launch memory for its tensor descriptors; such a launch cannot be replayed."""
    triton.set_allocator(_allocate)
    prevent_recording()


def _allocate(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
