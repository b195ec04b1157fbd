"""From tensors to launches: how many pieces a cache is cut into."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.compute_type import compute_constants
from ..common.launch import begins_early, is_aligned, launch
from .kernel import _attend_kernel, _combine_kernel

OP = "decode-attention"


class Setting(NamedTuple):
    """How programs run.

    Attributes:
        block: positions that a program reads at once, of heads of 128 in 16 bits.
        warps: of a program with up to 32 rows; more rows have twice as many.
        stages: blocks whose loads are under way.
        resident: programs that a multiprocessor runs at once.
        fetched: blocks that a program without ranges fetches into the L2 cache before it waits for the launch before
            (``AHEAD``).
    """

    block: int
    warps: int
    stages: int
    resident: int
    fetched: int = 2


# The fastest on an H200, and for GPUs with less shared memory than its programs take.
FASTEST, SMALLER = Setting(128, 4, 3, 1), Setting(64, 4, 3, 2)
SHARED_MEMORY = 144_000
# The most rows of a program: heads of a group times new tokens.
MOST_ROWS = 64
# What the number of pieces is chosen by: microseconds that a program needs besides reading, and bytes that a
# multiprocessor reads in one (measured on an H200).
STARTUP, RATE = 2.0, 32_000
# The launch that adds up pieces, in microseconds.
COMBINE = 2.5
MOST_PIECES = 256
# Whether the launch that adds up pieces begins while they are computed, where the device can.
EARLY = True
# Whether attention, too, begins before the launch before has ended, and lets the one after it begin. Alone it gains
# less than 1 % on an H200; in steps it was not timed.
AHEAD = False
# Channels of a program that adds up pieces, which loads all of them at once.
CHUNK = 32


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


@cache
def _has_room(index: int) -> bool:
    properties = torch.cuda.get_device_properties(index)
    return getattr(properties, "shared_memory_per_block_optin", 0) >= SHARED_MEMORY


@lru_cache(maxsize=256)
def pieces(pairs: int, positions: int, block: int, row_bytes: int, slots: int, resident: int) -> int:
    """Return the pieces to cut a cache of ``positions`` into, so that the last program ends early.

    Args:
        pairs: batch rows times key heads (times blocks of rows), each of which has its own programs.
        positions: of the cache; a range may be shorter.
        block: positions that a program reads at once.
        row_bytes: bytes of key and value of a position.
        slots: programs that run at once on the device.
        resident: of these, how many share a multiprocessor.
    """
    most = max(1, min(-(-positions // block), MOST_PIECES))
    best, shortest = 1, math.inf
    for split in range(1, most + 1):
        programs = pairs * split
        # A multiprocessor that has few programs reads no faster for that.
        reading = -(-positions // split) * row_bytes * resident / RATE
        time = math.ceil(programs / slots) * (STARTUP + reading) + (COMBINE if split > 1 else 0.0)
        if time < shortest * 0.99:
            best, shortest = split, time
    return best


def setting_of(query: Tensor, block_d: int, block_dv: int) -> Setting:
    """Return how programs run: as a tuning table says (``decode-attention 128x128x1``), else as on an H200."""
    first = FASTEST if query.is_cuda and _has_room(query.device.index) else SMALLER
    found = tuning.choose(
        OP, (block_d, block_dv), 1, query.dtype, query.device, lambda rows: first._asdict(), variant=first
    )
    return Setting(**found)


def candidates() -> list[dict[str, int]]:
    """Return settings worth timing, the default first."""
    others = [
        Setting(block, warps, stages, resident, fetched)
        for block, resident in ((128, 1), (64, 2), (64, 1), (32, 3)) for warps in (4, 8) for stages in (3, 4)
        for fetched in ((2, 0) if AHEAD else (FASTEST.fetched,))
    ]  # fmt: skip
    return [each._asdict() for each in (FASTEST, *(each for each in others if each != FASTEST))]


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return ``naive.decode_attention``; the last dimension of every tensor is contiguous, a mask has ``ranges``."""
    B, H, Q, D = query.shape
    G, N, DV = key.shape[1], key.shape[2], value.shape[3]
    out = query.new_empty((B, Q, H, DV))
    if out.numel() == 0:
        return out
    group = H // G
    rows = min(MOST_ROWS, max(16, triton.next_power_of_2(group * Q)))
    chunks = triton.cdiv(group * Q, rows)
    block_d, block_dv = (max(16, triton.next_power_of_2(size)) for size in (D, DV))
    row_bytes = (D + DV) * query.element_size()
    most, warps, stages, resident, fetched = setting_of(query, block_d, block_dv)
    # As many bytes of a block as with heads of 128 and 16 bits.
    block = max(16, most * 512 // max(512, 2 * block_d * query.element_size(), 2 * block_dv * query.element_size()))
    warps = warps if rows <= 32 else 2 * warps
    processors = _processors(query.device.index) if query.is_cuda else 4
    split = pieces(B * G * chunks, N, block, row_bytes, resident * processors, resident)
    size = B * Q * H
    part = out if split == 1 else torch.empty((split, size, DV), dtype=torch.float32, device=query.device)
    sums = out if split == 1 else torch.empty((split, size, 2), dtype=torch.float32, device=query.device)
    masks = mask if mask is None or mask.dtype == torch.uint8 else mask.view(torch.uint8)
    m_b, m_n = (0, 0) if masks is None else (masks.stride(0) if masks.shape[0] > 1 else 0, masks.stride(2))
    r_b = 0 if ranges is None or ranges.shape[0] == 1 else 3 * Q
    strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3], m_b, m_n, r_b)
    constants = {
        "GROUP": group, "Q": Q, "ROWS": rows, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": block,
        "FULL": block_d == D and block_dv == DV, "WHOLE": split == 1, "HAS_RANGES": ranges is not None,
        "HAS_MASK": mask is not None, "HAS_SINKS": sinks is not None, "HAS_CAP": bool(softcap),
        "MATH": compute_constants(query.dtype, _attend_kernel)["MATH"],
    }  # fmt: skip
    begins = ahead(query)
    constants["EARLY"], constants["AHEAD"] = split > 1 and early(query), begins
    constants["FETCHED"] = fetched * block
    log2e = math.log2(math.e)
    given = (
        query, key, value, query if masks is None else masks, query if ranges is None else ranges,
        query if sinks is None else sinks, out, part, sums,
    )  # fmt: skip
    numbers = (split, H, G, N, D, DV, *strides)
    cache_key = (
        *(t.dtype for t in given), *(is_aligned(t) for t in given), *(_kind(each) for each in (H, G, D, DV, *strides)),
        N >= 1 << 31, *constants.values(), warps, stages,
    )  # fmt: skip
    launch(
        _attend_kernel, (split, B * G, chunks), (*given, scale * log2e, softcap * log2e, *numbers), constants,
        num_warps=warps, num_stages=stages, key=cache_key, early=begins,
    )  # fmt: skip
    if split > 1:
        combine(part, sums, out, size, split, DV)
    return out


def early(tensor: Tensor) -> bool:
    """Return True if ``combine`` begins before the launch before it has ended, which then lets it."""
    return EARLY and begins_early(tensor)


def ahead(tensor: Tensor) -> bool:
    """Return True if attention begins before the launch before it has ended."""
    return AHEAD and begins_early(tensor)


def combine(part: Tensor, sums: Tensor, out: Tensor, size: int, split: int, channels: int) -> None:
    """Add up ``split`` pieces of ``size`` rows into ``out``: see ``_combine_kernel``."""
    splits = triton.next_power_of_2(split)
    block = min(CHUNK, triton.next_power_of_2(channels))
    begins = early(out)
    constants = {
        "SPLITS": splits, "STEP": min(splits, 8192 // block), "BLOCK_DV": block, "EARLY": begins,
        "AHEAD": begins and ahead(out),
    }  # fmt: skip
    launch(
        _combine_kernel, (size, triton.cdiv(channels, block), 1), (part, sums, out, size, split, channels), constants,
        num_warps=4, num_stages=1, early=begins,
        key=(out.dtype, is_aligned(part), is_aligned(sums), is_aligned(out), _kind(size), _kind(channels),
             *constants.values()),
    )  # fmt: skip


def _kind(number: int) -> int:
    """Return what Triton specializes of an integer: 1, multiples of 16, and whether it fits in 32 bits."""
    return 1 if number == 1 else (16 if number % 16 == 0 else 2) + (number >= 1 << 31)
