"""Work items of a layout: its lists, cut into pieces of similar length, the longest first.

An item is eight int32: the block, the entries ``[first, middle)`` that are visible in whole, ``[middle, end)`` those
that must be checked (a mask, or a block with empty places), the slot of a partial result (-1 for a whole list, -2 for
an item that fills a table up), and for keys the heads ``[from, to)`` of the group; the last is unused. Pieces of a
block are merged: ``merges`` has its first slot and the one after its last.

Items are made on the host, once for a layout, a number of heads and a length of pieces, and kept with the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .naive import BLOCKS, Layout
from .tiles import piece, processors

_NAME = "_hf_optim_plans"


class Plan(NamedTuple):
    """What the launches read of a layout, besides its heads, bits and orders.

    Attributes:
        q_items, q_merges: ``[L, n, 8]`` and ``[L, m, 4]`` int32, filled up with block -1; a head has the table of its
            layout.
        columns, masks: ``[entries + 1]``: of query blocks, in the order of the items; the last is not used.
        k_tables: ``[P]``: the table of each key head.
        k_items, k_merges: ``[T, n, 8]`` and ``[T, m, 4]``.
        rows, key_masks: ``[entries + 1]``: of key blocks.
        key_bits: ``bits`` transposed.
        q_slots, k_slots: of a head, for partial results.
        key_heads: P: the heads that have gradients of their own; more than there are key heads if query heads that
            share one have different orders of keys.
        covers_q, covers_k: 1 if every token has a place.
    """

    q_items: Tensor
    q_merges: Tensor
    columns: Tensor
    masks: Tensor
    k_tables: Tensor
    k_items: Tensor
    k_merges: Tensor
    rows: Tensor
    key_masks: Tensor
    key_bits: Tensor
    q_slots: int
    k_slots: int
    key_heads: int
    covers_q: int
    covers_k: int


def assemble(tensors: Sequence[Tensor], numbers: Sequence[int]) -> Plan:
    """Return a plan from its fields."""
    fields: Any = (*tensors, *numbers)
    return Plan(*fields)


class _Lists(NamedTuple):
    """Lists of blocks, those to be checked behind the others: int64 on the CPU; bounds are ``[L, blocks]``."""

    first: Tensor
    middle: Tensor
    end: Tensor
    others: Tensor
    masks: Tensor


def plan(layout: Any, B: int, H: int, G: int, N: int, M: int) -> Plan:
    """Return the work items of a layout: those made before, or new ones, which waits for the device.

    Args:
        layout: a ``naive.Layout``, or an object with its attributes that takes one more. Its tensors may not change
            afterwards.
        B, H, G: batch rows, query heads and key heads.
        N, M: queries and keys.

    Raises ``ValueError`` if the layout does not describe such a call.
    """
    held = getattr(layout, _NAME, None)
    if held is not None and (B, H, G, N, M) in held:
        return held[B, H, G, N, M]
    if torch.compiler.is_compiling():
        raise RuntimeError("a layout must have been used, or prepared (op.prepare), before it is part of a graph")
    if held is None:
        held = {}
        object.__setattr__(layout, _NAME, held)
    L, bounds = layout.starts.shape
    split = piece(B * H, len(layout.columns) // max(1, L), bounds - 1, layout.block, processors(layout.starts.device))
    # Batches of another size share a plan if their pieces are as long.
    key = ("pieces", split, H, G, N, M)
    if key not in held:
        held[key] = make(layout, H, G, N, M, split)
    held[B, H, G, N, M] = held[key]
    return held[key]


@torch.no_grad()
def make(layout: Any, H: int, G: int, N: int, M: int, split: int) -> Plan:
    """Return new work items, with lists of more than ``split`` entries (times heads, for keys) cut: see ``plan``."""
    if layout.block not in BLOCKS:
        raise ValueError(f"blocks of a layout have {', '.join(map(str, BLOCKS))} places, not {layout.block}")
    for name in Layout.__dataclass_fields__:
        each = getattr(layout, name)
        if isinstance(each, Tensor) and (each.dtype != torch.int32 or not each.is_contiguous()):
            raise ValueError(f"{name} of the layout must be contiguous int32")
    heads = layout.heads.cpu().long()
    empty_q, covers_q = _empty(layout.order_q, layout.starts.shape[1] - 1, layout.block, N, "order_q")
    empty_k, covers_k = _empty(layout.order_k, layout.key_starts.shape[1] - 1, layout.block, M, "order_k")
    L = layout.starts.shape[0]
    for name, right in {
        "heads": heads.shape == (H,) and bool(((heads >= 0) & (heads < L)).all()),
        "key_starts": layout.key_starts.shape[0] == L,
        "bits": layout.bits.shape[1:] == (layout.block, layout.block // 32),
        "order_q": len(empty_q) in (1, L),
        "order_k": len(empty_k) in (1, L),
    }.items():
        if not right:
            raise ValueError(f"{name} of the layout does not fit {H} heads, {N} queries, {M} keys and {L} head layouts")
    q = _lists(layout.starts, layout.columns, layout.masks, empty_k, len(layout.bits), "columns")
    k = _lists(layout.key_starts, layout.rows, layout.key_masks, empty_q, len(layout.bits), "rows")
    _compare(q, k)
    q_items = [_items([(_bounds(q, kind), (0, 1))], split) for kind in range(L)]
    # Heads of a group are summed in the block of a key: they must have the key at the same place.
    groups = heads.view(G, -1)
    same = bool((groups == groups[:, :1]).all())
    P = G if same or len(empty_k) == 1 else H
    groups = heads.view(P, -1)
    kinds, tables = torch.unique(groups, dim=0, return_inverse=True)
    k_items = []
    for group in kinds:
        layouts, lengths = torch.unique_consecutive(group, return_counts=True)
        ends = lengths.cumsum(0).tolist()
        runs = zip([0, *ends[:-1]], ends, strict=True)
        k_items.append(
            _items([(_bounds(k, kind), run) for kind, run in zip(layouts.tolist(), runs, strict=True)], split)
        )
    made = {
        "q_items": _filled([items for items, _, _ in q_items]),
        "q_merges": _filled([merges for _, merges, _ in q_items]),
        "columns": _and_one(q.others),
        "masks": _and_one(q.masks),
        "k_tables": tables,
        "k_items": _filled([items for items, _, _ in k_items]),
        "k_merges": _filled([merges for _, merges, _ in k_items]),
        "rows": _and_one(k.others),
        "key_masks": _and_one(k.masks),
    }
    sent = {name: each.to(torch.int32).contiguous().to(layout.starts.device) for name, each in made.items()}
    slots = (max(count for _, _, count in each) for each in (q_items, k_items))
    return Plan(**sent, key_bits=transposed(layout.bits), q_slots=next(slots), k_slots=next(slots), key_heads=P,
                covers_q=covers_q, covers_k=covers_k)  # fmt: skip


def _empty(order: Tensor | None, blocks: int, block: int, tokens: int, name: str) -> tuple[Tensor, int]:
    """Return which blocks have empty places, bool ``[L or 1, blocks]``, and 1 if every token has a place."""
    if order is None:
        if blocks != -(-tokens // block):
            raise ValueError(f"{blocks} blocks of {block} places do not hold {tokens} tokens, and there is no {name}")
        return (torch.arange(1, blocks + 1) * block > tokens)[None], 1
    order = order.cpu().long()
    if order.ndim != 2 or order.shape[1] != blocks * block:
        raise ValueError(f"{name} must be [layouts, {blocks} blocks of {block}], not {list(order.shape)}")
    counts = torch.zeros(len(order), tokens + 1, dtype=torch.int64)
    if bool(((order < -1) | (order >= tokens)).any()):
        raise ValueError(f"{name} has tokens outside of 0 to {tokens - 1}")
    counts.scatter_add_(1, torch.where(order < 0, tokens, order), torch.ones_like(order))
    if bool((counts[:, :tokens] > 1).any()):
        raise ValueError(f"{name} has a token at two places")
    return (order.view(len(order), blocks, block) < 0).any(-1), int(bool((counts[:, :tokens] == 1).all()))


def _lists(starts: Tensor, others: Tensor, masks: Tensor, empty: Tensor, bits: int, name: str) -> _Lists:
    """Return lists with the entries to be checked behind the others, in one array.

    Args:
        empty: bool ``[L or 1, other blocks]``: blocks with empty places.
        bits: the number of masks.
    """
    starts, others, masks = (each.cpu().long() for each in (starts, others, masks))
    counts = starts.diff(dim=1)
    right = (counts >= 0).all() & (starts >= 0).all() & (starts <= len(others)).all() & (others >= 0).all()
    right = right & (others < empty.shape[1]).all() & (masks >= -1).all() & (masks < bits).all()
    if not bool(right) or len(masks) != len(others):
        raise ValueError(f"{name} and masks of the layout are not lists of {empty.shape[1]} blocks and {bits} masks")
    L, n = counts.shape
    flat = counts.flatten()
    owner = torch.repeat_interleave(torch.arange(L * n), flat)
    begins = flat.cumsum(0) - flat
    at = starts[:, :-1].flatten()[owner] + torch.arange(len(owner)) - begins[owner]
    others, masks = others[at], masks[at]
    checked = (masks >= 0) | empty[(owner // n).clamp(max=len(empty) - 1), others]
    order = torch.argsort(owner * 2 + checked, stable=True)
    clear = torch.bincount(owner[~checked], minlength=L * n)
    first, middle, end = (each.view(L, n) for each in (begins, begins + clear, begins + flat))
    return _Lists(first, middle, end, others[order], masks[order])


def _compare(q: _Lists, k: _Lists) -> None:
    """Raise ``ValueError`` unless the lists by query block and by key block name the same blocks, each once."""
    sides = q.first.shape[1], k.first.shape[1]
    found = []
    for lists, by_key in ((q, False), (k, True)):
        L, n = lists.first.shape
        owner = torch.repeat_interleave(torch.arange(L * n), (lists.end - lists.first).flatten())
        kind, own = owner // n, owner % n
        row, column = (lists.others, own) if by_key else (own, lists.others)
        pairs, order = ((kind * sides[0] + row) * sides[1] + column).sort()
        found.append((pairs, lists.masks[order]))
    (ours, own_masks), (theirs, their_masks) = found
    if not torch.equal(ours, theirs) or not torch.equal(own_masks, their_masks):
        raise ValueError("the lists by query block and by key block of the layout are not the same")
    if bool((ours.diff() == 0).any()):
        raise ValueError("a list of the layout names a block twice")


def _bounds(lists: _Lists, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    return lists.first[kind], lists.middle[kind], lists.end[kind]


def _items(
    runs: list[tuple[tuple[Tensor, Tensor, Tensor], tuple[int, int]]], split: int
) -> tuple[Tensor, Tensor, int]:  # fmt: skip
    """Return items ``[n, 8]`` with the longest first, merges ``[m, 4]``, and the number of slots.

    Args:
        runs: lists of blocks with the heads ``[from, to)`` that have them.
    """
    parts = torch.cat([_cut(*bounds, *heads, split) for bounds, heads in runs])
    parts = parts[torch.argsort(parts[:, 0], stable=True)]
    counts = torch.bincount(parts[:, 0])
    shared = counts > 1
    slots = torch.where(shared, counts, 0)
    ends = slots.cumsum(0)
    merges = torch.stack([torch.arange(len(counts)), ends - slots, ends, torch.zeros_like(ends)], 1)[shared]
    is_piece = shared[parts[:, 0]]
    slot = torch.where(is_piece, is_piece.cumsum(0) - 1, -1)
    items = torch.cat([parts[:, :4], slot[:, None], parts[:, 4:], torch.zeros_like(slot)[:, None]], 1)
    length = (items[:, 3] - items[:, 1]) * (items[:, 6] - items[:, 5])
    order = torch.argsort(length, descending=True, stable=True)
    return items[order], merges, int(slots.sum())


def _cut(first: Tensor, middle: Tensor, end: Tensor, low: int, high: int, split: int) -> Tensor:
    """Return pieces ``[n, 6]`` (block, first, middle, end, from, to) of lists that the heads [low, high) have."""
    count, width = end - first, high - low
    # Heads are divided first; a list longer than ``split`` is cut for each head.
    share = (split // count.clamp(min=1)).clamp(1, width)
    by_head = -(-width // share)
    by_list = (-(-count // split)).clamp(min=1)
    pieces = by_head * by_list
    block = torch.repeat_interleave(torch.arange(len(count)), pieces)
    number = torch.arange(len(block)) - (pieces.cumsum(0) - pieces)[block]
    head, piece, heads, parts = number // by_list[block], number % by_list[block], by_head[block], by_list[block]
    begin = first[block] + count[block] * piece // parts
    finish = first[block] + count[block] * (piece + 1) // parts
    between = torch.minimum(torch.maximum(middle[block], begin), finish)
    low_head, high_head = low + width * head // heads, low + width * (head + 1) // heads
    return torch.stack([block, begin, between, finish, low_head, high_head], 1)


def _and_one(entries: Tensor) -> Tensor:
    """Return entries and one more, since kernels load the entry after the one that they compute."""
    return torch.cat([entries, entries.new_zeros(1)])


def _filled(tables: list[Tensor]) -> Tensor:
    """Return tables as one tensor, shorter ones filled up with blocks and slots that are not stored."""
    most = max(len(each) for each in tables)
    found = tables[0].new_zeros(len(tables), most, tables[0].shape[1])
    found[..., 0] = -1
    if found.shape[2] == 8:
        found[..., 4] = -2
    for number, each in enumerate(tables):
        found[number, : len(each)] = each
    return found


def transposed(bits: Tensor) -> Tensor:
    """Return masks with rows and columns exchanged, in the same format; one mask of nothing if there are none."""
    if not len(bits):
        return bits.new_zeros(1, *bits.shape[1:])
    shifts = torch.arange(32, dtype=torch.int32, device=bits.device)
    weights = torch.ones((), dtype=torch.int64, device=bits.device) << shifts.long()
    found = []
    for some in bits.split(1024):
        pairs = ((some[..., None] >> shifts) & 1).flatten(2).mT
        words = (pairs.unflatten(2, (-1, 32)).long() * weights).sum(-1)
        found.append(words.to(torch.int32))
    return torch.cat(found).contiguous()
