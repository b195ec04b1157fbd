"""Attention with tokens that are global in their row: which ones they are differs from row to row.

A query that is not global sees the keys of its pattern and, in a second product, those of the global tokens, gathered
for it; both are merged by their log-sum-exp. The queries of global tokens are gathered, too, and see their whole row.
So all rows share one layout, and time is linear in the length for a bounded number of global tokens.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .attend import attend, attend_lists, lists_for, long_enough, masked_attention, must_move
from .flash_cpu import Source
from .head_patterns import HeadPatterns, seen_mask
from .layout import BLOCK, Layout
from .pattern import kept_tensors
from .rows import Apart, Rows


@dataclass(frozen=True)
class Pieces:
    """Which pieces of attention are computed, between global (g) and other, long (l) tokens: queries stand first.

    Attributes:
        g2g, g2l, l2g: whole pieces.
        l2l: the pattern, between tokens that are not global.
        own_span: a global token sees, of the others, those from itself to the next global token.
    """

    g2g: bool = True
    g2l: bool = True
    l2g: bool = True
    l2l: bool = True
    own_span: bool = False


@dataclass(frozen=True, eq=False)
class BatchGlobals:
    """The global tokens of a batch.

    Attributes:
        mask: bool ``[B, M]``; False for padding.
        index: int64 ``[B, g]``: their places in each row, ascending; 0 behind the last of a row.
        valid: bool ``[B, g]``: False behind the last of a row.
        readers: one entry for each time that the attention of a layer has read them.
    """

    mask: Tensor
    index: Tensor
    valid: Tensor
    readers: list[bool] = field(default_factory=list)

    @classmethod
    def of(cls, mask: Tensor) -> BatchGlobals:
        """Return the global tokens of a mask. This waits for the device."""
        counts = mask.sum(1)
        most = int(counts.max()) if len(counts) else 0
        index = torch.sort((~mask).to(torch.int8), dim=1, stable=True).indices[:, :most]
        valid = torch.arange(most, device=mask.device) < counts[:, None]
        return cls(mask, index.masked_fill(~valid, 0), valid)

    def gather(self, part: Tensor) -> Tensor:
        """Return ``[B, H, M, D]`` at the global tokens, ``[B, H, g, D]``."""
        return part.gather(2, self.index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))

    def projected(self, states: Tensor, projection: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the projection of the states ``[B, M, d]`` of the global tokens, ``[B, g, e]``, and zero for others.

        The projection gets the global tokens alone, ``[tokens, d]``: what observes it counts no other rows.
        """
        row, slot = self.valid.nonzero(as_tuple=True)
        found = projection(states[row, self.index[row, slot]])
        return found.new_zeros(*self.valid.shape, found.shape[-1]).index_put((row, slot), found)

    def write(self, out: Tensor, found: Tensor) -> Tensor:
        """Return ``out`` ``[B, H, N, D]`` with ``found`` ``[B, H, g, D]`` at the global tokens."""
        row, slot = self.valid.nonzero(as_tuple=True)
        rows = found.transpose(1, 2)[row, slot].to(out.dtype)
        return out.transpose(1, 2).index_put((row, self.index[row, slot]), rows).transpose(1, 2)


def attend_globally(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: HeadPatterns,
    scale: float,
    tokens: BatchGlobals,
    pieces: Pieces = Pieces(),
    own: tuple[Tensor, Tensor, Tensor] | None = None,
    rows: Rows | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    way: str = "auto",
) -> Tensor:
    """Compute softmax attention under patterns and with tokens that are global in their row.

    Args:
        tokens: the global tokens.
        pieces: what is computed of attention between global and other tokens.
        own: query ``[B, H, g, D]`` of the global tokens, key and value ``[B, G, M, D]`` of all, with which the rows of
            the global tokens are computed; None: with ``query``, ``key`` and ``value``.
        query, key, value, heads, scale, rows, mask, dropout, way: as in ``attend``. ``heads`` are the patterns of
            tokens that are not global.

    Returns:
        ``[B, H, N, D]``; zero for a query that sees nothing (padding).

    Raises ``ValueError`` for keys from a cache.
    """
    length = key.shape[2]
    if query.shape[2] != length:
        raise ValueError("tokens that are global in their row need whole rows: set use_cache=False")
    if not tokens.index.shape[1] and pieces.l2l:
        return attend(query, key, value, heads, scale, rows, mask, dropout, way)
    segments = torch.zeros_like(tokens.mask, dtype=torch.int32) if rows is None else rows.segments
    everything = pieces == Pieces() and heads.is_full(length)
    if everything:
        out = attend(query, key, value, heads, scale, rows, mask, dropout, way)
    elif mask is None and lists_for(query, heads, length, way) is not None:
        out = _linear(query, key, value, heads, scale, tokens, pieces, rows, segments, dropout, way)
    else:
        if any(pattern.repeats for pattern in heads.patterns):
            raise ValueError("a pattern that counts keys several times has no tokens that are global in their row")
        seen = seen_mask(heads, length, length, rows, query.device)
        seen = _pieces_seen(seen if pieces.l2l else torch.zeros_like(seen), tokens, pieces, segments)
        out = masked_attention(query, key, value, seen, mask, scale, dropout)
        if own is None:
            return out
    if everything and own is None:
        return out
    return _global_rows(out, own or (tokens.gather(query), key, value), scale, tokens, pieces, segments, mask, dropout)


def _linear(
    query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float, tokens: BatchGlobals,
    pieces: Pieces, rows: Rows | None, segments: Tensor, dropout: float, way: str,
) -> Tensor:  # fmt: skip
    """Return the rows of tokens that are not global, ``[B, H, N, D]``; the others mean nothing."""
    if rows is not None and must_move(rows, heads):
        return _each_row(query, key, value, heads, scale, tokens, pieces, rows, dropout, way)
    length, sources = key.shape[2], []
    lists = lists_for(query, heads, length, "blocks")
    if pieces.l2l and lists is not None:
        hidden = segments.masked_fill(tokens.mask, -1)
        sources.append(Source(key, value, lists, hidden))
    if pieces.l2g and tokens.index.shape[1]:
        near, far = tokens.gather(key), tokens.gather(value)
        layout = whole_layout(query.shape[1], length, tokens.index.shape[1], query.device)
        known = torch.where(tokens.valid, segments.gather(1, tokens.index), -1)
        sources.append(Source(near, far, [layout], known))
    if not sources:
        return query.new_zeros(*query.shape[:3], value.shape[-1])
    return attend_lists(query, sources, scale, segments, dropout)


def _each_row(
    query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float, tokens: BatchGlobals,
    pieces: Pieces, rows: Rows, dropout: float, way: str,
) -> Tensor:  # fmt: skip
    """Compute each document in a row of its own, those of different lengths apart, as ``attend`` does."""
    apart = Apart.of(rows)
    q, k, v = (apart.take(part) for part in (query, key, value))
    segments, mask = apart.segments(), tokens.mask.flatten()[apart.index.clamp_min(0)] & (apart.index >= 0)
    step = heads.length_step if heads.reads_length else q.shape[2]
    steps = (apart.lengths() + step - 1) // step
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    for count in steps.unique().tolist():
        some, length = (steps == count).nonzero()[:, 0], count * step
        one, two, three = (long_enough(x[some], length) for x in (q, k, v))
        inner = Rows(long_enough(segments[some], length, -1))
        own = BatchGlobals.of(long_enough(mask[some].int(), length).bool())
        part = attend_globally(one, two, three, heads, scale, own, pieces, None, inner, None, dropout, way)
        out = out.index_copy(0, some, long_enough(part, out.shape[2]))
    return apart.put(out, len(query))


def _global_rows(
    out: Tensor, own: tuple[Tensor, Tensor, Tensor], scale: float, tokens: BatchGlobals, pieces: Pieces,
    segments: Tensor, mask: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    """Return ``out`` with the rows of global tokens in it."""
    seen = _pieces_seen(None, tokens, pieces, segments)
    if mask is not None:
        mask = mask.expand(len(out), -1, out.shape[2], -1)
        mask = mask.gather(2, tokens.index[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    return tokens.write(out, masked_attention(*own, seen, mask, scale, dropout))


def _pieces_seen(pattern: Tensor | None, tokens: BatchGlobals, pieces: Pieces, segments: Tensor) -> Tensor:
    """Return what queries see, bool ``[B, H or 1, N, M]``, given what the pattern lets those see that are not global.

    Without a pattern: what global tokens see, ``[B, 1, g, M]``.
    """
    key = tokens.mask[:, None, None, :]
    span = tokens.mask.cumsum(1)
    places = tokens.index if pattern is None else torch.arange(tokens.mask.shape[1], device=key.device).expand_as(span)
    own = segments.gather(1, places)[:, :, None]
    same = ((own == segments[:, None, :]) & (own >= 0))[:, None]
    wide = torch.full_like(same, pieces.g2l)
    if pieces.own_span:
        wide = wide & (span.gather(1, places)[:, :, None] == span[:, None, :])[:, None]
    found = torch.where(key, pieces.g2g, wide)
    if pattern is not None:
        found = torch.where(tokens.mask[:, None, :, None], found, torch.where(key, pieces.l2g, pattern))
    return found & same


@kept_tensors(64)
def whole_layout(heads: int, queries: int, keys: int, device: torch.device) -> Layout:
    """Return the layout in which each of ``queries`` tokens sees each of ``keys`` others."""
    rows, columns = (-(-count // BLOCK) for count in (queries, keys))
    full = torch.full((rows * columns,), -1, dtype=torch.int32, device=device)

    def count(most: int) -> Tensor:
        return torch.arange(most, dtype=torch.int32, device=device)

    return Layout(
        BLOCK,
        (count(rows + 1) * columns)[None],
        count(columns).repeat(rows),
        full,
        full.new_zeros((0, BLOCK, BLOCK // 32)),
        (count(columns + 1) * rows)[None],
        count(rows).repeat(columns),
        full,
        None,
        None,
        full.new_zeros(heads),
    )
