"""Attention over lists of blocks on a CPU, by PyTorch's flash kernel for CPUs: no scores are stored, also in training.

Blocks of keys are gathered a few at a time, so that they stay in the cache of the processor, and query blocks that read
equally masked blocks share one mask. Passes are merged by their log-sum-exp; the kernel's backward takes the
log-sum-exp of the whole, so each pass adds its part of the gradients.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .layout import Layout

FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
GATHERED = 2**19  # numbers that are gathered of keys, or held in masks, at a time
ORDERED = 2**20  # numbers of queries that are put into another order at a time
MOST_SHARED = 64  # masks that several query blocks share, for each number of key blocks


def flash_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if ``flash_attention`` computes these tensors."""
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and FLASH is not None and FLASH_BACKWARD is not None and alike


@dataclass(eq=False)
class Source:
    """Keys that queries see.

    Attributes:
        key, value: ``[B, G, M, D]``, G divides the number of query heads.
        lists: the layouts of the passes.
        segments: int ``[B, M]``, or None.
    """

    key: Tensor
    value: Tensor
    lists: Sequence[Layout]
    segments: Tensor | None


def flash_attention(query: Tensor, sources: Sequence[Source], scale: float, segments: Tensor | None = None) -> Tensor:
    """Compute the attention over the union of disjoint sets of keys, and of passes over each; differentiable once.

    Args:
        query: ``[B, H, N, D]``.
        sources: the keys, of the dtype of the query.
        scale: of the scores.
        segments: int ``[B, N]``: a query sees a key if the segments of both are equal and not negative.

    Returns:
        ``[B, H, N, D]`` in the dtype of the query, zero for a query without keys.
    """
    tensors = [part for source in sources for part in (source.key, source.value)]
    lists = [(source.lists, source.segments) for source in sources]
    return _Flash.apply(query, lists, scale, segments, *tensors)  # type: ignore[no-any-return]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, lists: Any, scale: float, segments: Tensor | None, *tensors: Tensor) -> Tensor:
        parts = [
            _flash_forward(query, tensors[2 * index], tensors[2 * index + 1], each, scale, segments, of_keys)
            for index, (each, of_keys) in enumerate(lists)
        ]
        out, sums = parts[0]
        for more, of_more in parts[1:]:
            out, sums = _merged(out.to(sums.dtype), sums, more, of_more)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, out, sums, *tensors)
        ctx.lists, ctx.scale, ctx.segments = lists, scale, segments
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, out, sums, *tensors = ctx.saved_tensors
        of_query, found = torch.zeros_like(query), []
        for index, (lists, of_keys) in enumerate(ctx.lists):
            key, value = tensors[2 * index : 2 * index + 2]
            one, *others = _flash_backward(grad, query, key, value, out, sums, lists, ctx.scale, ctx.segments, of_keys)
            of_query = of_query + one
            found += others
        return of_query, None, None, None, *found


@dataclass(eq=False)
class _Group:
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
class _Plan:
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
    groups: list[_Group]


@dataclass(eq=False)
class _Part:
    """One pattern in one pass over some heads: its plan, the query heads, and the heads of keys that they fold onto."""

    layout: Layout
    plan: _Plan
    heads: Tensor | None
    key_heads: Tensor | None
    fold: int


def _parts(lists: Sequence[Layout], query: Tensor, key: Tensor) -> Iterator[list[_Part]]:
    """Yield the parts of each pass."""
    batch, query_heads, tokens, size = query.shape
    share = query_heads // key.shape[1]
    at_once = max(1, ORDERED // (batch * tokens * size * share)) * share
    for layout in lists:
        heads = layout.heads.tolist()
        found = []
        for pattern in sorted(set(heads)):
            plan = _plan(layout, pattern, tokens, key.shape[2])
            if not plan.groups:
                continue
            chosen = [head for head, own in enumerate(heads) if own == pattern]
            groups = sorted({head // share for head in chosen})
            whole = len(groups) * share == len(chosen)
            natural = plan.order_q is None and plan.order_k is None
            step = len(chosen) if natural else at_once
            if len(chosen) == query_heads and step >= query_heads:
                found.append(_Part(layout, plan, None, None, share))
                continue
            for start in range(0, len(chosen), step):
                some = chosen[start : start + step]
                of_keys = [head // share for head in (some[::share] if whole else some)]
                index = torch.tensor(some), torch.tensor(of_keys)
                found.append(_Part(layout, plan, *index, share if whole else 1))
        yield found


@lru_cache(maxsize=256)
def _plan(layout: Layout, pattern: int, tokens: int, key_tokens: int) -> _Plan:
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
            groups.append(_Group(rows[some], columns[some], None if seen.all() else seen, None))
        if own.any():
            groups.append(_Group(rows[own], columns[own], None, masks[own]))
    return _Plan(order_q, order_k, place_q, blocks_q, blocks_k, missing, groups)


def _seen(layout: Layout, masks: Tensor, columns: Tensor, missing: Tensor) -> Tensor:
    """Return what the queries of each row see, bool ``[R, block, count * block]``."""
    shifts = torch.arange(32, dtype=torch.int32)
    if not len(layout.bits):
        seen = torch.ones(*masks.shape, layout.block, layout.block, dtype=torch.bool)
    else:
        words = torch.where((masks < 0)[..., None, None], -1, layout.bits[masks.clamp_min(0)])
        seen = (words[..., None] >> shifts & 1).bool().flatten(-2)
    return (seen & ~missing[columns][:, :, None]).transpose(1, 2).flatten(2)


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, lists: Sequence[Layout], scale: float,
    segments: Tensor | None, of_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output ``[B, N, H, D]`` and the log-sum-exp ``[B, N, H]``."""
    batch, heads, tokens, size = query.shape
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    merged = len(lists) > 1
    out = query.new_zeros(batch, tokens, heads, size, dtype=accurate if merged else query.dtype)
    sums = torch.full((batch, tokens, heads), -torch.inf, dtype=accurate)
    first = True
    for parts in _parts(lists, query, key):
        for part in parts:
            found, lse = _forward_part(query, key, value, part, scale, segments, of_keys)
            if part.heads is None and first and not merged:
                return found, lse
            old_out, old = (x if part.heads is None else x.index_select(2, part.heads) for x in (out, sums))
            if not first:
                found, lse = _merged(old_out, old, found, lse)
            if part.heads is None:
                out, sums = found.to(out.dtype), lse
            else:
                out.index_copy_(2, part.heads, found.to(out.dtype))
                sums.index_copy_(2, part.heads, lse)
        first = False
    return out.to(query.dtype), sums


def _merged(out: Tensor, sums: Tensor, other: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(sums, more)
    base = total.masked_fill(torch.isneginf(total), 0)
    out = out * torch.exp(sums - base)[..., None]
    return out.addcmul_(other.to(out.dtype), torch.exp(more - base)[..., None]), total


def _forward_part(
    query: Tensor, key: Tensor, value: Tensor, part: _Part, scale: float,
    segments: Tensor | None, of_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, batch = part.plan, len(query)
    q = _placed(query, part.heads, plan.order_q, plan.blocks_q, part.layout.block)
    k, v = (_placed(x, part.key_heads, plan.order_k, plan.blocks_k, part.layout.block) for x in (key, value))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sums = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for rows, columns, mask, empty in _chunks(part, batch, k, segments, of_keys):
        taken = _folded(q.index_select(0, rows), part.fold)
        found, lse = FLASH(taken, _block_rows(k, columns), _block_rows(v, columns), attn_mask=mask, scale=scale)
        found, lse = _unfolded(found, part.fold), _unfolded(lse[..., None], part.fold)[..., 0]
        if empty is not None:
            found = found.masked_fill(empty[..., None, None], 0)
            lse = lse.masked_fill(empty[..., None], -torch.inf)
        out.index_copy_(0, rows, found)
        sums.index_copy_(0, rows, lse)
    tokens = query.shape[2]
    return _back(out, plan.place_q, batch, tokens, 0), _back(sums, plan.place_q, batch, tokens, -torch.inf)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
    lists: Sequence[Layout], scale: float, segments: Tensor | None, of_keys: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    batch, accurate = len(query), sums.dtype
    sums = sums.masked_fill(torch.isneginf(sums), torch.inf).transpose(1, 2)  # weights of 0
    out = out.transpose(1, 2)
    totals = [torch.zeros(x.transpose(1, 2).shape, dtype=accurate) for x in (query, key, value)]
    for parts in _parts(lists, query, key):
        for part in parts:
            plan, block = part.plan, part.layout.block
            at_query = part.heads, plan.order_q, plan.blocks_q, block
            at_key = part.key_heads, plan.order_k, plan.blocks_k, block
            q, g, o = (_placed(x, *at_query) for x in (query, grad, out))
            s = _placed(sums[..., None], *at_query, empty=torch.inf)
            k, v = (_placed(x, *at_key) for x in (key, value))
            into = [torch.zeros(x.shape, dtype=accurate) for x in (q, k, v)]
            for rows, columns, mask, _ in _chunks(part, batch, k, segments, of_keys):
                taken = [_folded(x.index_select(0, rows), part.fold) for x in (q, g, o, s)]
                keys, values = _block_rows(k, columns), _block_rows(v, columns)
                found = FLASH_BACKWARD(
                    taken[1],
                    taken[0],
                    keys,
                    values,
                    taken[2],
                    taken[3][..., 0],
                    0.0,
                    False,
                    attn_mask=mask,
                    scale=scale,
                )
                into[0].index_copy_(0, rows, _unfolded(found[0], part.fold).to(accurate))
                for total, one in zip(into[1:], found[1:], strict=True):
                    blocks = one.transpose(1, 2).reshape(-1, *total.shape[1:])
                    total.index_add_(0, columns.flatten(), blocks.to(accurate))
            places = (plan.order_q, part.heads), (plan.order_k, part.key_heads), (plan.order_k, part.key_heads)
            for total, one, (order, heads) in zip(totals, into, places, strict=True):
                _add(total, one.view(batch, -1, *one.shape[2:]), order, heads)
    return [total.to(x.dtype).transpose(1, 2) for total, x in zip(totals, (query, key, value), strict=True)]


def _add(total: Tensor, part: Tensor, order: Tensor | None, heads: Tensor | None) -> None:
    """Add ``[B, places, h, D]`` to ``[B, N, H, D]``."""
    if order is None:
        part = part[:, : total.shape[1]]
    else:
        real = order >= 0
        part = torch.zeros_like(total[:, :, : part.shape[2]]).index_copy_(1, order[real], part[:, real])
    if heads is None:
        total += part
    else:
        total.index_add_(2, heads, part)


def _chunks(
    part: _Part, batch: int, keys: Tensor, segments: Tensor | None, of_keys: Tensor | None
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
            _placed(each[:, None, :, None], None, order, count, block, empty=-1)[..., 0, 0]
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


def _placed(
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


def _back(part: Tensor, place: Tensor | None, batch: int, tokens: int, empty: float) -> Tensor:
    """Return ``[B * blocks, block, ...]`` as ``[B, N, ...]``; a token without a place has the value ``empty``."""
    part = part.reshape(batch, -1, *part.shape[2:])
    if place is None:
        return part[:, :tokens]
    found = part.index_select(1, place.clamp_min(0))
    if (place < 0).any():
        found[:, place < 0] = empty
    return found


def _block_rows(part: Tensor, columns: Tensor) -> Tensor:
    """Return the blocks ``[R, count]`` of ``[blocks, block, G, D]`` as ``[R, G, count * block, D]``."""
    found = part.index_select(0, columns.flatten())
    return found.view(len(columns), columns.shape[1] * part.shape[1], *part.shape[2:]).transpose(1, 2)


def _folded(part: Tensor, fold: int) -> Tensor:
    """Return ``[R, block, H, D]`` as ``[R, H / fold, fold * block, D]``."""
    if fold == 1:
        return part.transpose(1, 2)
    return part.unflatten(2, (-1, fold)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfolded(part: Tensor, fold: int) -> Tensor:
    """Return ``[R, H / fold, fold * block, D]`` as ``[R, block, H, D]``."""
    if fold == 1:
        return part.transpose(1, 2)
    return part.unflatten(2, (fold, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
