"""From tensors to launches: which pieces the rings of a layer are cut into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.compute_type import compute_constants
from ..common.launch import begins_early, is_aligned, launch
from .kernel import _merge_kernel, _ring_kernel

OP = "ring-attention"
Table = list[list[int]]


class Setting(NamedTuple):
    """How programs run.

    Attributes:
        block: keys that a program reads at once, of heads of 128 in 16 bits.
        warps: of a program.
        stages: blocks whose loads are under way.
    """

    block: int
    warps: int
    stages: int


# Of decode_attention on an H200.
FIRST = Setting(64, 4, 3)
# Programs of a multiprocessor that the keys of a step are divided among, and the fewest keys of a program.
RESIDENT, LEAST = 2, 256
MOST_PIECES = 256
MOST_ROWS = 64
# Whether the launch that adds up pieces begins while they are computed, where the device can.
EARLY = True
# Channels of a program that adds up pieces, which loads all of them at once.
CHUNK = 32


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def items_of(rings: Sequence[Sequence[int]], rows: int, multiprocessors: int) -> tuple[Table, Table]:
    """Return items and merges for rings as in ``naive.ring_attention``, on the host.

    An item is the key head, the number of the piece, the pieces of its ring, the slot of its partial result (-1 if it
    has one piece), and the ring. A merge is a key head, its first slot and its pieces, and 0. The longest pieces are
    first, so that the last programs end about together.

    Args:
        rows: of the batch.
        multiprocessors: of the device.
    """
    keys = rows * sum(count for *_, count in rings)
    length = max(LEAST, -(-keys // (RESIDENT * multiprocessors)))
    items, merges, slot = [], [], 0
    for g, (first, apart, slots, count) in enumerate(rings):
        pieces = max(1, min(-(-(count - 1) // length), MOST_PIECES))
        if pieces > 1:
            merges.append([g, slot, pieces, 0])
        for piece in range(pieces):
            items.append([g, piece, pieces, slot + piece if pieces > 1 else -1, first, apart, slots, count])
        slot += pieces if pieces > 1 else 0
    items.sort(key=lambda item: -(-(item[7] - 1) // item[2]), reverse=True)
    return items, merges


def setting_of(query: Tensor, block_d: int, block_dv: int) -> Setting:
    """Return how programs run: as a tuning table says (``ring-attention 64x64x1``), else the first setting."""
    found = tuning.choose(OP, (block_d, block_dv), 1, query.dtype, query.device, lambda rows: FIRST._asdict())
    return Setting(**found)


def ring_attention(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, counts: Tensor,
    shares: Tensor | None, items: Tensor, merges: Tensor, size: int, ramp: int, scale: float,
) -> Tensor:  # fmt: skip
    """Return ``naive.ring_attention``; the last dimension of every tensor is contiguous, ``items_of`` made the items.

    ``merges`` int64 ``[m, 4]``; their number and the largest count of pieces follow from ``items``.
    """
    B, H, D = query.shape
    G, DV = key.shape[1], value.shape[2]
    out = query.new_empty((B, H, DV))
    if out.numel() == 0:
        return out
    group, pieces = H // G, len(items) - (G - len(merges))
    parts = pieces if len(merges) else 0
    rows = max(16, triton.next_power_of_2(group))
    block_d, block_dv = (max(16, triton.next_power_of_2(width)) for width in (D, DV))
    most, warps, stages = setting_of(query, block_d, block_dv)
    # As many bytes of a block as with heads of 128 and 16 bits.
    block = max(16, most * 256 // (max(block_d, block_dv, 64) * query.element_size()))
    part = out if not parts else torch.empty((B, parts, group, DV), dtype=torch.float32, device=query.device)
    sums = out if not parts else torch.empty((B, parts, group, 2), dtype=torch.float32, device=query.device)
    begins = EARLY and bool(parts) and begins_early(query)
    constants = {
        "GROUP": group, "ROWS": rows, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "BLOCK_N": block,
        "FULL": block_d == D and block_dv == DV, "HAS_RAMP": shares is not None,
        "MATH": compute_constants(query.dtype, _ring_kernel)["MATH"], "EARLY": begins,
    }  # fmt: skip
    given = (
        query, key, value, keys, values, tokens, counts, counts if shares is None else shares, items, out, part, sums,
    )  # fmt: skip
    numbers = (parts, H, D, DV, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2])
    known = (*(t.dtype for t in given), *(is_aligned(t) for t in given), *_kinds(numbers), *constants.values())
    floats = (scale * math.log2(math.e), float(size), float(ramp), 1 / ramp)
    launch(
        _ring_kernel, (len(items), B, 1), (*given, *floats, *numbers), constants, num_warps=warps, num_stages=stages,
        key=(*known, warps, stages),
    )  # fmt: skip
    if parts:
        _merge(part, sums, merges, out, group, begins)
    return out


def _merge(part: Tensor, sums: Tensor, merges: Tensor, out: Tensor, group: int, begins: bool) -> None:
    """Add up pieces into ``out``: see ``_merge_kernel``."""
    (B, H, DV), parts = out.shape, part.shape[1]
    splits = triton.next_power_of_2(min(parts, MOST_PIECES))
    block = min(CHUNK, triton.next_power_of_2(DV))
    constants = {
        "GROUP": group, "SPLITS": splits, "STEP": min(splits, 8192 // block), "BLOCK_DV": block, "EARLY": begins,
    }  # fmt: skip
    numbers = (parts, H, DV)
    launch(
        _merge_kernel, (len(merges) * group, triton.cdiv(DV, block), B), (part, sums, merges, out, *numbers), constants,
        num_warps=4, num_stages=1, early=begins,
        key=(out.dtype, is_aligned(out), *_kinds(numbers), *constants.values()),
    )  # fmt: skip


def _kinds(numbers: Sequence[int]) -> tuple[int, ...]:
    """Return what Triton specializes of integers: 1, multiples of 16, and whether they fit in 32 bits."""
    return tuple(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers)
