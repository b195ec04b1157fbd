"""Queries in blocks that read the same keys: the shape of a product for any number of queries per group.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

SCORES = 2**24  # that are computed at a time


def in_blocks(group: Tensor, size: int, groups: int) -> tuple[Tensor, Tensor]:
    """Sort items into blocks of ``size`` places, each block for the items of one group; the last one may have gaps.

    Args:
        group: int64 ``[N]``, of each item, from 0 to ``groups`` - 1; items of other numbers get no place.
        size: places in a block.
        groups: how many groups there are.

    Returns:
        The items int64 ``[blocks, size]``, -1 for a gap, in each group in the order of the items, and the group of each
        block, int64 ``[blocks]``. There are ``N / size + groups`` blocks, of which the last are empty; on a CPU, whose
        values are at hand, the empty ones are left out.
    """
    inside = (group >= 0) & (group < groups)
    own, order = torch.where(inside, group, groups).sort(stable=True)
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=group.device).scatter_add_(0, own, torch.ones_like(own))
    blocks = (counts[:groups] + size - 1) // size
    ends, begin = blocks.cumsum(0), counts.cumsum(0) - counts
    total = len(group) // size + groups
    if group.device.type == "cpu" and not group.is_meta and type(group).__name__ != "FakeTensor":
        total = int(ends[-1])
    first = torch.cat([ends - blocks, ends.new_full((1,), total)])
    place = first[own] * size + torch.arange(len(own), device=group.device) - begin[own]
    table = group.new_full((total * size + 1,), -1)  # with a place for items that get none
    table = table.scatter(0, place.clamp_max(total * size), order)[:-1]
    run = torch.searchsorted(ends, torch.arange(total, device=group.device), right=True)
    return table.unflatten(0, (total, size)), run.clamp_max(groups - 1)


def rows_of(part: Tensor, index: Tensor) -> Tensor:
    """Return the rows of ``part`` at ``index``: ``[*index, ...]``.

    Unlike ``part[index]``, whose gradient sorts the indices and adds up the rows of equal ones one after the other.
    """
    return part.index_select(0, index.flatten()).unflatten(0, index.shape)


def put_back(outs: list[Tensor], items: list[Tensor], count: int) -> Tensor:
    """Return the outputs ``[blocks, size, D]`` of the items ``[blocks, size]``: ``[count, D]``, zero without one."""
    item, out = torch.cat(items).flatten(), torch.cat(outs).flatten(0, 1)
    found = out.new_zeros(count + 1, out.shape[1])  # the last one for the gaps
    return found.index_copy(0, torch.where(item < 0, count, item), out)[:count]


def slices_of(blocks: int, scores: int) -> Iterator[slice]:
    """Yield runs of blocks, each with ``scores`` scores, that are computed at a time."""
    step = max(1, SCORES // max(1, scores))
    for begin in range(0, blocks, step):
        yield slice(begin, min(blocks, begin + step))


def weights_of(scores: Tensor, seen: Tensor | None, dropout: float) -> Tensor:
    """Return the softmax of scores over the last axis where ``seen``; zero in rows that see nothing.

    Args:
        scores: any floating-point dtype; the softmax of half precision is computed in float32.
        seen: bool, broadcasts to ``scores``; None: all.
        dropout: share of the weights that is dropped.
    """
    wide = scores.float() if scores.dtype in (torch.float16, torch.bfloat16) else scores
    if seen is None:
        weights = wide.softmax(-1)
    else:
        # Not -inf: a row without keys would be undefined, and so would its gradient.
        weights = wide.masked_fill(~seen, torch.finfo(wide.dtype).min).softmax(-1).masked_fill(~seen, 0)
    return torch.dropout(weights, dropout, dropout > 0).to(scores.dtype)
