"""Attention whose scores have a bias by the distance of query and key: densely, or over the blocks that the bias keeps.

The patterns say which blocks are computed and may hold more keys than the bias keeps; a key at -inf is not seen. A bias
that is a ramp is computed by the kernel, where one is installed.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from torch import Tensor

from .attend import alike, attend, installed_kernel, lists_for
from .blocked import DistanceBias, blocked_attention
from .head_patterns import HeadPatterns
from .layout import BLOCK
from .pattern import Pattern
from .rows import Apart, Rows
from .terms import Band


def nearest_keys(counts: Sequence[int], causal: bool) -> HeadPatterns:
    """Return for each head the pattern of its ``counts`` nearest keys on a side, the query among them."""
    return _nearest_keys(tuple(counts), causal)


@lru_cache(maxsize=1024)
def _nearest_keys(counts: tuple[int, ...], causal: bool) -> HeadPatterns:
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
        bias: by the distance of positions; None: each head sees its ``counts`` nearest keys. One that is the logarithm
            of a ramp, which a kernel computes from three numbers of a head, has a method ``ramp`` that returns reach,
            slope and limit of each head, float32 ``[H, 3]``, differentiable: a key x tokens away counts
            ``min((reach - x) slope, 1)`` times, and not at all where that is not above 0, or from the limit on.
        causal: keys behind a query are not seen.
        scale: of the scores.
        rows: padding and documents; None if each row is one whole document.
        mask: bool (True: visible) or additive, broadcast to ``[B, H, N, M]``.
        dropout: share of the attention weights that is dropped.
        way: ``auto``, ``blocks`` or ``dense``.

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
            kernel = None if dropout or not hasattr(bias, "ramp") else installed_kernel(query, key, value, scale)
            if kernel is not None and "ramp" in kernel.__annotations__:
                return kernel(query, key, value, lists[0], scale, segments, segments, bias.ramp())[0]  # type: ignore
            return blocked_attention(query, key, value, lists[0], scale, segments, segments, dropout, bias)[0]
    return attend(query, key, value, heads, scale, rows, mask, dropout, bias=bias)
