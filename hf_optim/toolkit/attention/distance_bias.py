"""Attention whose scores have a bias by the distance of query and key: densely, or over the blocks that the bias keeps.

The patterns say which blocks are computed and may hold more keys than the bias keeps; a key at -inf is not seen. Where
a kernel computes patterns without a bias, the nearest keys of a head, at which its bias is zero, are a pass of their
own; both are merged by their log-sum-exp.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from .attend import HeadPatterns, alike, attend, lists_for, parts_of
from .blocked import DistanceBias, blocked_attention, merge
from .flash_cpu import Source
from .layout import BLOCK
from .pattern import Pattern
from .rows import Apart, Rows
from .terms import Band, Spans, Term


@dataclass(frozen=True)
class Ring(Term):
    """Keys from ``nearest`` to ``farthest`` positions from the query, on both sides."""

    nearest: int
    farthest: int

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        distance = (query - key).abs()
        return (distance >= self.nearest) & (distance <= self.farthest)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        before = (first - self.farthest).clamp_min(0), last - self.nearest + 1
        behind = first + self.nearest, (last + self.farthest + 1).clamp_max(length)
        return [before, behind]

    @property
    def moves_along(self) -> bool:
        return True


def nearest_keys(counts: Sequence[int], causal: bool) -> HeadPatterns:
    """Return for each head the pattern of its ``counts`` nearest keys on a side, the query among them."""
    one = [Pattern((Band(count - 1, 0 if causal else count - 1),), causal) for count in counts]
    return HeadPatterns.of(one, len(one))


def _in_blocks(counts: Sequence[int]) -> list[int]:
    """Return the counts as whole blocks: lists of blocks stay as they are while spans change a little."""
    return [-(-count // BLOCK) * BLOCK for count in counts]


def attend_biased(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    counts: Sequence[int],
    unbiased: Sequence[int],
    bias: DistanceBias | None,
    causal: bool,
    scale: float,
    rows: Rows | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    way: str = "auto",
) -> Tensor:
    """Compute softmax attention with ``bias`` added to the scores.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]``; M = N, or more if the first keys come from a cache.
        counts: how many nearest keys each head can see at most, the query among them; the bias is -inf beyond.
        unbiased: of how many nearest keys the bias of each head is zero.
        bias: by the distance of positions; None: each head sees its ``counts`` nearest keys.
        causal: keys behind a query are not seen.
        scale: of the scores.
        rows: padding and documents; None if each row is one whole document.
        mask: bool (True: visible) or additive, broadcast to ``[B, H, N, M]``.
        dropout: share of the attention weights that is dropped.
        way: ``auto``; ``blocks``: in one pass; ``passes``: in two, as where a kernel is; ``dense``.

    Returns:
        ``[B, H, N, D]``; zero for a query that sees nothing (padding).
    """
    length = key.shape[2]
    query, key, value = alike(query, key, value)
    if bias is None or min(unbiased) >= length:
        plain = way if way in ("auto", "dense") else "blocks"
        return attend(query, key, value, nearest_keys(counts, causal), scale, rows, mask, dropout, plain)
    heads = nearest_keys(_in_blocks(counts), causal)
    if mask is None and query.shape[2] == length and way != "dense":
        if rows is not None and rows.holes:
            # Places differ from positions here: each document is computed in a row of its own.
            apart = Apart.of(rows)
            parts = [apart.take(part) for part in (query, key, value)]
            inner = Rows.of(apart.segments())
            own = None if inner.plain else inner
            out = attend_biased(*parts, counts, unbiased, bias, causal, scale, own, None, dropout, way)  # type: ignore
            return apart.put(out, len(query))
        lists = lists_for(query, heads, length, "auto" if way == "auto" else "blocks")
        if lists is not None:
            segments = None if rows is None else rows.segments
            whole = [count // BLOCK * BLOCK for count in unbiased]
            if any(whole) and (way == "passes" or (way == "auto" and query.is_cuda)):
                return _in_two_passes(query, key, value, counts, whole, bias, causal, scale, segments, dropout)
            return blocked_attention(query, key, value, lists[0], scale, segments, segments, dropout, bias)[0]
    return attend(query, key, value, heads, scale, rows, mask, dropout, bias=bias)


def _in_two_passes(
    query: Tensor, key: Tensor, value: Tensor, counts: Sequence[int], whole: Sequence[int], bias: DistanceBias,
    causal: bool, scale: float, segments: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    length, heads = key.shape[2], len(counts)
    far = [Pattern((Ring(count, most - 1),), causal) for count, most in zip(whole, _in_blocks(counts), strict=True)]
    lists = [
        lists_for(query, each, length, "blocks") for each in (nearest_keys(whole, causal), HeadPatterns.of(far, heads))
    ]
    assert lists[0] is not None, "no head sees all of the row without a bias"
    assert lists[1] is not None, "no pattern of distances sees the query itself"
    parts = parts_of(query, Source(key, value, lists[0], segments), scale, segments, dropout)
    parts.append(blocked_attention(query, key, value, lists[1][0], scale, segments, segments, dropout, bias))
    return merge(parts)[0]
