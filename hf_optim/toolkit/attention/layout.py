"""Lists of blocks: which blocks of keys each block of queries reads, and what of a block is visible.

A layout is what a kernel knows of a pattern. It is made once for a pattern and a length.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from .pattern import Pass, Pattern, kept_tensors

BLOCK = 64
PAIRS_AT_ONCE = 2**18  # pairs of tokens that are compared at a time


@dataclass(eq=False)
class Layout:
    """The lists of one pass over L patterns, in int32; places past the last token are empty.

    Attributes:
        block: tokens in a block, of queries and of keys.
        starts: ``[L, query blocks + 1]``: where the list of a query block begins in ``columns``.
        columns, masks: ``[entries]``: a block of keys, and its row of ``bits``; -1 for a block that is wholly visible.
        bits: ``[distinct masks, block, block / 32]``: bit j of word w of row r: query r sees key ``32 w + j``.
        key_starts: ``[L, key blocks + 1]``: where the list of a key block begins in ``rows``.
        rows, key_masks: ``[entries]``: a block of queries, and its mask.
        order_q, order_k: ``[L, places]``: the token at each place, -1 for none; None: tokens in their natural order.
        heads: ``[H]``: the pattern of each query head.
        shift: for each head what is added to its log-sum-exp, if pairs count several times; None if no head has any.
    """

    block: int
    starts: Tensor
    columns: Tensor
    masks: Tensor
    bits: Tensor
    key_starts: Tensor
    rows: Tensor
    key_masks: Tensor
    order_q: Tensor | None
    order_k: Tensor | None
    heads: Tensor
    shift: tuple[float, ...] | None = None

    @property
    def entries(self) -> int:
        """Number of blocks that are read, of all patterns."""
        return len(self.columns)

    def to(self, device: torch.device | str) -> Layout:
        """Return the layout on a device."""
        moved: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            moved[field.name] = value.to(device) if isinstance(value, Tensor) else value
        return Layout(**moved)

    def unpacked(self) -> Tensor:
        """Return the masks as bool ``[distinct masks + 1, block, block]``; the last one, at index -1, is all True."""
        shifts = torch.arange(32, dtype=torch.int32, device=self.bits.device)
        bits = (self.bits[..., None] >> shifts & 1).bool().flatten(-2)
        return torch.cat([bits, torch.ones_like(bits[:1]) if len(bits) else bits.new_ones(1, self.block, self.block)])


@kept_tensors(256)
def layouts(
    patterns: tuple[Pattern, ...], heads: tuple[int, ...], length: int, block: int, device: torch.device
) -> tuple[Layout, ...]:
    """Return the layouts of the passes over ``length`` tokens; they are kept for the next call.

    Args:
        patterns: the distinct patterns of the heads. A pattern with fewer passes than another has empty lists.
        heads: the pattern of each query head, an index into ``patterns``.
        length: number of tokens in a row, without padding.
        block: tokens in a block, a multiple of 32.
        device: where the lists are made and kept.
    """
    passes = [pattern.passes() for pattern in patterns]
    found = []
    for index in range(max(map(len, passes))):
        present = [each[index] if index < len(each) else None for each in passes]
        found.append(_layout(present, heads, length, block, device))
    return tuple(found)


def _layout(passes: list[Pass | None], heads: tuple[int, ...], length: int, block: int, device: torch.device) -> Layout:
    orders = [_orders(each, length, device) for each in passes]
    natural = all(order is None for order in orders)
    token_orders = [order or _natural(length, device) for order in orders]
    tokens_q, tokens_k = (_padded([order[i] for order in token_orders], block) for i in range(2))
    blocks_q, blocks_k = tokens_q.shape[1] // block, tokens_k.shape[1] // block
    lists = [_entries(each, q, k, length, block) for each, q, k in zip(passes, tokens_q, tokens_k, strict=True)]
    row, column, seen = (torch.cat([each[i] for each in lists]) for i in range(3))
    pattern = torch.cat([torch.full_like(each[0], i) for i, each in enumerate(lists)])
    mask, bits = _distinct(seen, block)
    by_key = torch.argsort((pattern * blocks_k + column) * blocks_q + row)
    times = [1 if each is None else each.times for each in passes]
    shift = tuple(math.log(times[own]) for own in heads) if max(times) > 1 else None
    return Layout(
        block,
        _starts(pattern, row, len(passes), blocks_q),
        column.int(),
        mask,
        bits,
        _starts(pattern, column, len(passes), blocks_k),
        row[by_key].int(),
        mask[by_key].contiguous(),
        None if natural else tokens_q.int(),
        None if natural else tokens_k.int(),
        torch.tensor(heads, dtype=torch.int32, device=device),
        shift,
    )


def _orders(each: Pass | None, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
    return None if each is None else each.terms[0].orders(length, device)


def _natural(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(length, device=device)
    return tokens, tokens


def _padded(orders: list[Tensor], block: int) -> Tensor:
    """Return orders of different lengths as ``[L, places]``, places a multiple of ``block``."""
    places = -(-max(1, *(len(order) for order in orders)) // block) * block
    padded = orders[0].new_full((len(orders), places), -1)
    for row, order in zip(padded, orders, strict=True):
        row[: len(order)] = order
    return padded


def _entries(
    each: Pass | None, tokens_q: Tensor, tokens_k: Tensor, length: int, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the blocks of a pass that are not empty: query block and key block ``[E]``, and packed ``[E, words]``.

    A row of the last is -1 in every word if each pair of tokens in the block is visible.
    """
    blocks_q, blocks_k = len(tokens_q) // block, len(tokens_k) // block
    device = tokens_q.device
    if each is None:
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        return nothing, nothing, torch.empty(0, block * block // 32, dtype=torch.int32, device=device)
    # Block by block: one more where a span begins, one less where it ends.
    covered = torch.zeros(blocks_q, blocks_k + 1, dtype=torch.int32, device=device)
    row = torch.arange(blocks_q, device=device)
    natural = each.terms[0].order == ("natural", 1)
    last_place = (tokens_q >= 0).long().cumsum(0).argmax()  # blocks behind it are empty
    first, last = row * block, (row * block + block - 1).clamp_max(last_place)
    for term in each.terms:
        for low, high in term.spans(first, last, length):
            if natural and each.causal:
                high = torch.minimum(high, last + 1)
            low, high = low.clamp(0, len(tokens_k)), high.clamp(0, len(tokens_k))
            some = (high > low) & (first <= last)
            covered.index_put_((row[some], low[some] // block), covered.new_ones(()), accumulate=True)
            ends = (high[some] + block - 1) // block
            covered.index_put_((row[some], ends), -covered.new_ones(()), accumulate=True)
    row, column = (covered.cumsum(1)[:, :-1] > 0).nonzero().unbind(1)
    kept_rows, kept_columns, kept_masks = [], [], []
    step = max(1, PAIRS_AT_ONCE // block**2)
    for start in range(0, len(row), step):
        r, c = row[start : start + step], column[start : start + step]
        query, key = tokens_q.view(-1, block)[r][:, :, None], tokens_k.view(-1, block)[c][:, None, :]
        real = (query >= 0) & (key >= 0)
        seen = each.sees(query, key, length) & real
        some = seen.flatten(1).any(1)
        whole = (seen | ~real).flatten(1).all(1)
        packed = torch.where(whole[:, None], -1, _packed(seen.flatten(1)))
        kept_rows.append(r[some])
        kept_columns.append(c[some])
        kept_masks.append(packed[some])
    if not kept_rows:
        return row, column, torch.empty(0, block * block // 32, dtype=torch.int32, device=device)
    return torch.cat(kept_rows), torch.cat(kept_columns), torch.cat(kept_masks)


def _packed(seen: Tensor) -> Tensor:
    """Return bool ``[E, bits]`` as int32 ``[E, bits / 32]``."""
    shifts = torch.arange(32, device=seen.device)
    words = (seen.unflatten(-1, (-1, 32)).long() << shifts).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).int()


def _distinct(packed: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Return for each mask its row among the distinct ones, -1 for a full one, and the distinct ones."""
    whole = (packed == -1).all(1)
    index = torch.full((len(packed),), -1, dtype=torch.int32, device=packed.device)
    partial = packed[~whole]
    if not len(partial):
        return index, packed.new_zeros((0, block, block // 32))
    # Masks are grouped by a random sum, and the groups checked: sorting whole masks takes far longer.
    generator = torch.Generator().manual_seed(0)
    weights = torch.randint(-(2**62), 2**62, (packed.shape[1],), generator=generator).to(packed.device)
    sums = (partial.long() * weights).sum(1)
    _, group = torch.unique(sums, return_inverse=True)
    distinct = partial.new_empty((int(group.max()) + 1, packed.shape[1]))
    distinct[group] = partial
    if not torch.equal(distinct[group], partial):
        distinct, group = torch.unique(partial, dim=0, return_inverse=True)
    index[~whole] = group.int()
    return index, distinct.unflatten(1, (block, block // 32)).contiguous()


def _starts(pattern: Tensor, block: Tensor, patterns: int, blocks: int) -> Tensor:
    """Return ``[patterns, blocks + 1]``: where the entries of each block begin, entries sorted by pattern and block."""
    counts = torch.zeros(patterns * blocks, dtype=torch.int64, device=block.device)
    counts.index_add_(0, pattern * blocks + block, torch.ones_like(block))
    ends = counts.cumsum(0)
    first = torch.cat([ends.new_zeros(1), ends])
    places = torch.arange(patterns, device=block.device)[:, None] * blocks
    return first[places + torch.arange(blocks + 1, device=block.device)].int()
