"""The route of pairs to experts in one launch, or two for many pairs, without waiting for the host.

It is a counting sort. Each program ranks the pairs of its chunk by comparing them with all experts; with several
chunks, a launch before it counts the pairs of each chunk. No atomic operation is used: pairs of an expert keep their
order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import is_aligned, launch
from .naive import Route, most_blocks

# Numbers that a program compares at a time: pairs times experts, and pairs with each other.
TILE, MOST_PAIRS = 8192, 64
WARPS = 4
# A chunk has this many tiles of pairs, or more where there would be more chunks than programs should add up.
TILES, MOST_CHUNKS = 2, 256


# What differs from call to call.
NUMBERS = ["P", "ENTRIES", "CHUNKS"]


@triton.jit(do_not_specialize=["P"])
def _count_kernel(experts, counts, P, E, CHUNK: tl.constexpr, PAIRS: tl.constexpr, EXPERTS: tl.constexpr):
    """Count the pairs of a chunk by expert: counts [chunks, E]."""
    chunk = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, CHUNK, PAIRS):
        pairs = chunk * CHUNK + start + tl.arange(0, PAIRS)
        ids = tl.load(experts + pairs, mask=pairs < P, other=-1).to(tl.int32)
        total += tl.sum((ids[:, None] == e[None, :]).to(tl.int32), axis=0)
    tl.store(counts + chunk * E + e, total, mask=e < E)


@triton.jit(do_not_specialize=NUMBERS)
def _route_kernel(
    experts, counts, order, offsets, blocks, P, E, ENTRIES, CHUNKS, CHUNK: tl.constexpr, PAIRS: tl.constexpr,
    EXPERTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, ALONE: tl.constexpr,
):  # fmt: skip
    """Sort the pairs of a chunk and write its part of the blocks; ``CHUNKS`` programs, ALONE if it is one.

    Each program adds up the counts of all chunks (``ROWS`` at a time): those before its own are where its pairs begin.
    """
    chunk = tl.program_id(0)
    e = tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    before = tl.zeros((EXPERTS,), tl.int32)
    if ALONE:
        for start in range(0, CHUNK, PAIRS):
            pairs = start + tl.arange(0, PAIRS)
            ids = tl.load(experts + pairs, mask=pairs < P, other=-1).to(tl.int32)
            # Columns past E compare with -1: ids from E on are computed by none.
            total += tl.sum((ids[:, None] == tl.where(e < E, e, -2)[None, :]).to(tl.int32), axis=0)
    else:
        for start in range(0, CHUNKS, ROWS):
            row = start + tl.arange(0, ROWS)
            own = tl.load(
                counts + row[:, None] * E + e[None, :], mask=(row < CHUNKS)[:, None] & (e < E)[None, :], other=0
            )
            total += tl.sum(own, axis=0)
            before += tl.sum(tl.where((row < chunk)[:, None], own, 0), axis=0)
    ends = tl.cumsum(total, axis=0)
    first = ends - total
    if chunk == 0:
        tl.store(offsets + 1 + e, ends, mask=e < E)
        tl.store(offsets + e, first, mask=e == 0)
    at = first + before
    # Pairs that no expert computes follow behind all others.
    rest = tl.sum(total) + chunk * CHUNK - tl.sum(before)
    for start in range(0, CHUNK, PAIRS):
        pairs = chunk * CHUNK + start + tl.arange(0, PAIRS)
        ids = tl.load(experts + pairs, mask=pairs < P, other=-1).to(tl.int32)
        ids = tl.where((ids < 0) | (ids >= E), -1, ids)
        same = (ids[:, None] == tl.where(e < E, e, -2)[None, :]).to(tl.int32)
        place = tl.where(ids < 0, rest, tl.sum(same * at[None, :], axis=1))
        # Comparing all pairs of the tile with each other is faster than a scan of a column for each expert.
        earlier = (ids[:, None] == ids[None, :]) & (pairs[None, :] < pairs[:, None])
        place += tl.sum(earlier.to(tl.int32), axis=1)
        at += tl.sum(same, axis=0)
        rest += tl.sum((ids < 0).to(tl.int32))
        tl.store(order + place, pairs, mask=pairs < P)
    need = (total + BLOCK - 1) // BLOCK
    need_ends = tl.cumsum(need, axis=0)
    used = tl.sum(need)
    for start in range(chunk * PAIRS, ENTRIES, CHUNKS * PAIRS):
        number = start + tl.arange(0, PAIRS)
        expert = tl.sum((need_ends[None, :] <= number[:, None]).to(tl.int32), axis=1)
        row = tl.where(
            expert[:, None] == e[None, :], (first - (need_ends - need) * BLOCK)[None, :] + number[:, None] * BLOCK, 0
        )
        is_used = number < used
        tl.store(blocks + number * 2, tl.where(is_used, expert, -1), mask=number < ENTRIES)
        tl.store(blocks + number * 2 + 1, tl.where(is_used, tl.sum(row, axis=1), 0), mask=number < ENTRIES)


def route(experts: Tensor, count: int, block: int) -> Route:
    """Return ``naive.route`` of ``experts`` ``[T, k]``, contiguous."""
    pairs, device = experts.numel(), experts.device
    entries = most_blocks(pairs, count, block)
    order = torch.empty(pairs, dtype=torch.int32, device=device)
    blocks = torch.empty((entries, 2), dtype=torch.int32, device=device)
    if pairs == 0:
        return Route(order, torch.zeros(count + 1, dtype=torch.int32, device=device), blocks)
    offsets = torch.empty(count + 1, dtype=torch.int32, device=device)
    columns = max(16, triton.next_power_of_2(count))
    tile = max(16, min(MOST_PAIRS, TILE // columns))
    tiles = max(TILES, triton.next_power_of_2(-(-pairs // (tile * MOST_CHUNKS))))
    if pairs <= tile:
        tile, tiles = max(16, triton.next_power_of_2(pairs)), 1
    chunks = -(-pairs // (tile * tiles))
    counts = order if chunks == 1 else torch.empty((chunks, count), dtype=torch.int32, device=device)
    constants = {"CHUNK": tile * tiles, "PAIRS": tile, "EXPERTS": columns}
    key = (experts.dtype, is_aligned(experts), *constants.values(), count == 1, count % 16 == 0)
    if chunks > 1:
        launch(
            _count_kernel, (chunks, 1, 1), (experts, counts, pairs, count), constants, num_warps=WARPS, num_stages=1,
            key=key,
        )  # fmt: skip
    constants |= {"ROWS": tile, "BLOCK": block, "ALONE": chunks == 1}
    launch(
        _route_kernel, (chunks, 1, 1), (experts, counts, order, offsets, blocks, pairs, count, entries, chunks),
        constants, num_warps=WARPS, num_stages=1, key=(*key, block, chunks == 1),
    )  # fmt: skip
    return Route(order, offsets, blocks)
