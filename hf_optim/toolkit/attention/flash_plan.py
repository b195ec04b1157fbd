"""What attention over lists of blocks computes on a CPU: query blocks in groups that share masks, some at a time.

Query blocks that read equally many blocks of keys are one group, and those of them that read equally masked blocks
share one mask. Work is cut so that gathered keys stay in the cache of the processor.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .layout import Layout
from .pattern import kept_tensors

GATHERED = 2**19  # numbers that are gathered of keys, or held in masks, at a time
ORDERED = 2**20  # numbers of queries that are put into another order at a time
MOST_SHARED = 64  # masks that several query blocks share, for each number of key blocks


@dataclass(eq=False)
class Group:
    """Query blocks that read the same number of key blocks.

    Attributes:
        rows: int64 ``[R]``.
        columns: int64 ``[R, count]``.
        seen: bool ``[block, count * block]`` if all share a mask, None if all is visible or ``masks`` is set.
        masks: int64 ``[R, count]`` if each has masks of its own: indices into those of the layout.
    """

    rows: Tensor
    columns: Tensor
    seen: Tensor | None
    masks: Tensor | None


@dataclass(eq=False)
class Plan:
    """One pattern of a layout.

    Attributes:
        order_q, order_k: int64 ``[places]``: the token at each place, -1 for none; None: tokens in their order.
        place_q: int64 ``[N]``: the place of each query, -1 for none; None: tokens in their order.
        blocks_q, blocks_k: number of blocks.
        missing: bool ``[blocks_k, block]``: places without a key.
        groups: all query blocks that read anything.
    """

    order_q: Tensor | None
    order_k: Tensor | None
    place_q: Tensor | None
    blocks_q: int
    blocks_k: int
    missing: Tensor
    groups: list[Group]


@dataclass(eq=False)
class Part:
    """One pattern in one pass over some heads: its plan, the query heads, and the heads of keys that they fold onto."""

    layout: Layout
    plan: Plan
    heads: Tensor | None
    key_heads: Tensor | None
    fold: int


def parts_of_passes(lists: Sequence[Layout], query: Tensor, key: Tensor) -> Iterator[list[Part]]:
    """Yield the parts of each pass."""
    batch, query_heads, tokens, size = query.shape
    share = query_heads // key.shape[1]
    at_once = max(1, ORDERED // (batch * tokens * size * share)) * share
    for layout in lists:
        heads = layout.heads.tolist()
        found = []
        for pattern in sorted(set(heads)):
            plan = plan_of(layout, pattern, tokens, key.shape[2])
            if not plan.groups:
                continue
            chosen = [head for head, own in enumerate(heads) if own == pattern]
            groups = sorted({head // share for head in chosen})
            whole = len(groups) * share == len(chosen)
            natural = plan.order_q is None and plan.order_k is None
            step = len(chosen) if natural else at_once
            if len(chosen) == query_heads and step >= query_heads:
                found.append(Part(layout, plan, None, None, share))
                continue
            for start in range(0, len(chosen), step):
                some = chosen[start : start + step]
                of_keys = [head // share for head in (some[::share] if whole else some)]
                index = torch.tensor(some), torch.tensor(of_keys)
                found.append(Part(layout, plan, *index, share if whole else 1))
        yield found


@kept_tensors(256)
def plan_of(layout: Layout, pattern: int, tokens: int, key_tokens: int) -> Plan:
    block = layout.block
    order_q, order_k = (None if o is None else o[pattern].long() for o in (layout.order_q, layout.order_k))
    blocks_q, blocks_k = layout.starts.shape[1] - 1, layout.key_starts.shape[1] - 1
    natural = torch.arange(blocks_k * block)
    keys = torch.where(natural < key_tokens, natural, -1) if order_k is None else order_k
    place_q = None
    if order_q is not None:
        straight = torch.arange(len(order_q))
        if torch.equal(order_q, torch.where(straight < tokens, straight, -1)):
            order_q = None
        else:
            place_q = torch.full((tokens,), -1)
            real = order_q >= 0
            place_q[order_q[real]] = straight[real]
    missing = keys.view(-1, block) < 0
    starts = layout.starts[pattern].long()
    counts = starts.diff()
    groups = []
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = (counts == count).nonzero()[:, 0]
        entries = starts[rows][:, None] + torch.arange(count)
        columns, masks = layout.columns[entries].long(), layout.masks[entries].long()
        # A block that is wholly visible is masked where it has empty places.
        names = torch.where((masks < 0) & missing.any(1)[columns], -2 - columns, masks)
        distinct, of_row = torch.unique(names, dim=0, return_inverse=True)
        each = torch.bincount(of_row)
        own = torch.zeros(len(rows), dtype=torch.bool)
        if len(distinct) > MOST_SHARED:
            own = each[of_row] < max(2, len(rows) // MOST_SHARED)
        for one in of_row[~own].unique().tolist():
            some = of_row == one
            first = int(some.nonzero()[0])
            seen = _seen(layout, masks[first][None], columns[first][None], missing)[0]
            groups.append(Group(rows[some], columns[some], None if seen.all() else seen, None))
        if own.any():
            groups.append(Group(rows[own], columns[own], None, masks[own]))
    return Plan(order_q, order_k, place_q, blocks_q, blocks_k, missing, groups)


def _seen(layout: Layout, masks: Tensor, columns: Tensor, missing: Tensor) -> Tensor:
    """Return what the queries of each row see, bool ``[R, block, count * block]``."""
    shifts = torch.arange(32, dtype=torch.int32)
    if not len(layout.bits):
        seen = torch.ones(*masks.shape, layout.block, layout.block, dtype=torch.bool)
    else:
        words = torch.where((masks < 0)[..., None, None], -1, layout.bits[masks.clamp_min(0)])
        seen = (words[..., None] >> shifts & 1).bool().flatten(-2)
    return (seen & ~missing[columns][:, :, None]).transpose(1, 2).flatten(2)


def chunks(
    part: Part, batch: int, keys: Tensor, segments: Tensor | None, of_keys: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Yield some query blocks at a time.

    Yields the query blocks ``[R]`` and their key blocks ``[R, count]``, numbered through the rows of the batch; the
    additive mask ``[R, 1, fold * block, count * block]``, None if all is visible; and which queries see no key, bool
    ``[R or 1, block]``, None if there are none.
    """
    plan, block = part.plan, part.layout.block
    of_q = of_k = None
    if segments is not None and of_keys is not None:
        of_q, of_k = (
            placed(each[:, None, :, None], None, order, count, block, empty=-1)[..., 0, 0]
            for each, order, count in (
                (segments, plan.order_q, plan.blocks_q), (of_keys, plan.order_k, plan.blocks_k),
            )
        )  # fmt: skip
    row = torch.arange(batch)[:, None]
    for group in plan.groups:
        count = group.columns.shape[1]
        rows = (row * plan.blocks_q + group.rows).flatten()
        columns = (row[..., None] * plan.blocks_k + group.columns).flatten(0, 1)
        index = torch.arange(len(group.rows)).repeat(batch)
        own = torch.full((len(rows),), group.masks is not None)
        if of_q is not None and of_k is not None:
            one_q, one_k = _one_segment(of_q)[rows], _one_segment(of_k)[columns]
            own |= (one_k != one_q[:, None]).any(1) | (one_q < 0)
            real = one_q != -1  # blocks of padding have no output
            rows, columns, index, own = rows[real], columns[real], index[real], own[real]
        at_once = max(1, GATHERED // (count * block * max(keys.shape[2] * keys.shape[3], 1)))
        for some in _split((~own).nonzero()[:, 0], at_once):
            if group.seen is None:
                yield rows[some], columns[some], None, None
            else:
                mask = _additive(group.seen[None], keys.dtype, part.fold).expand(len(some), -1, -1, -1)
                empty = ~group.seen.any(-1)
                yield rows[some], columns[some], mask, empty[None] if empty.any() else None
        at_once = max(1, min(at_once, GATHERED // (count * block * block * part.fold)))
        for some in _split(own.nonzero()[:, 0], at_once):
            if group.masks is not None:
                seen = _seen(part.layout, group.masks[index[some]], group.columns[index[some]], plan.missing)
            elif group.seen is not None:
                seen = group.seen[None]
            else:
                seen = torch.ones(1, block, count * block, dtype=torch.bool)
            if of_q is not None and of_k is not None:
                query, key = of_q[rows[some]], of_k[columns[some]].flatten(1)
                seen = seen & (query[:, :, None] == key[:, None, :]) & (query >= 0)[:, :, None]
            yield rows[some], columns[some], _additive(seen, keys.dtype, part.fold), ~seen.any(-1)


def _split(index: Tensor, size: int) -> tuple[Tensor, ...]:
    return index.split(size) if len(index) else ()


def _one_segment(segments: Tensor) -> Tensor:
    """Return the segment of each block ``[blocks, block]``, -2 if it has several."""
    return torch.where((segments == segments[:, :1]).all(1), segments[:, 0], -2)


def _additive(seen: Tensor, dtype: torch.dtype, fold: int) -> Tensor:
    """Return bool ``[R, block, keys]`` as 0 and -inf, ``[R, 1, fold * block, keys]``."""
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill_(~seen, -torch.inf)
    return mask.repeat(1, fold, 1)[:, None]


def placed(
    part: Tensor, heads: Tensor | None, order: Tensor | None, blocks: int, block: int, empty: float = 0.0
) -> Tensor:
    """Return ``[B, H, N, D]`` as ``[B * blocks, block, h, D]``; places without a token hold ``empty`` or any token."""
    part = part.transpose(1, 2)
    if heads is not None:
        part = part.index_select(2, heads)
    places = blocks * block
    if order is None:
        if part.shape[1] < places:
            part = functional.pad(part, (0, 0, 0, 0, 0, places - part.shape[1]), value=empty)
    else:
        part = part.index_select(1, order.clamp_min(0))
        if empty:
            part.masked_fill_((order < 0)[:, None, None], empty)
    return part.reshape(-1, block, *part.shape[2:])
