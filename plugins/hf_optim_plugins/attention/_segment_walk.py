"""Attention segment by segment, each with a memory of the tokens before it, through which no gradient flows.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hf_optim.toolkit.attention import dense_product

Bias = Callable[[int, int, int], Tensor]


@dataclass(frozen=True, eq=False)
class Slots:
    """Keys and values of windows of tokens, each window made one.

    Attributes:
        key, value: ``[B, G, W, D]``: of windows of ``ratio`` tokens, from the first token of the row on.
        ratio: tokens of a window.
        most: slots that a query sees; the latest.
    """

    key: Tensor
    value: Tensor
    ratio: int
    most: int

    def seen_by(self, begin: int, memory: int) -> tuple[Tensor, Tensor] | None:
        """Return the slots that the segment at ``begin`` sees, those of tokens before its memory; None if none."""
        high = max(0, begin - memory) // self.ratio
        low = max(0, high - self.most)
        return None if high == low else (self.key[:, :, low:high], self.value[:, :, low:high])


def attend_segments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    size: int,
    memory: int,
    scale: float,
    dropout: float = 0.0,
    earlier: tuple[Tensor, Tensor] | None = None,
    there: Tensor | None = None,
    bias: Bias | None = None,
    slots: Slots | None = None,
) -> Tensor:
    """Compute causal attention of rows that begin at the border of a segment.

    A query sees its segment up to itself, and the ``memory`` tokens before the segment. Time and memory are those of
    ``N / size`` products of ``size`` queries and ``memory + size`` keys.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, N, D]``.
        size, memory: tokens of a segment, and before it.
        scale: of the scores.
        dropout: share of the attention weights that is dropped.
        earlier: keys and values ``[B, G, E + N, D]`` of the E tokens before the row, and of the row as its later
            segments see it; those of the E tokens are enough for one segment. None: ``key`` and ``value`` without
            their gradient.
        there: bool ``[B, E]``: which of the E tokens exist, those next to the row.
        bias: ``bias(begin, end, m)`` returns what is added to the scores of the queries from ``begin`` to ``end``,
            with m tokens of memory, ``[B, H, n, m + n]``.
        slots: keys and values of compressed tokens, that queries see in addition; not together with ``bias``.

    Returns:
        ``[B, H, N, D]``.
    """
    count = query.shape[2]
    before = 0 if there is None else there.shape[1]
    seen_later = (key.detach(), value.detach()) if earlier is None else earlier
    parts = []
    for begin in range(0, count, size):
        end, middle = min(begin + size, count), before + begin
        low = max(0, middle - memory)
        held, own = middle - low, end - begin
        keys, values = (
            torch.cat([old[:, :, low:middle], new[:, :, begin:end]], 2) if held else new[:, :, begin:end]
            for old, new in zip(seen_later, (key, value), strict=True)
        )
        asked = query[:, :, begin:end]
        if slots is not None and (older := slots.seen_by(begin, memory)) is not None:
            keys, values = (torch.cat([old, new], 2) for old, new in zip(older, (keys, values), strict=True))
            held += older[0].shape[2]
        seen = None
        if held or bias is not None:
            place = torch.arange(held + own, device=query.device)
            seen = place <= held + place[:own, None]
        if there is not None and low < before:
            exists = torch.cat([there[:, low:], there.new_ones(len(there), held + own - before + low)], 1)
            seen = seen & exists[:, None, None]  # type: ignore[operator]
        added = None if bias is None else bias(begin, end, held).masked_fill(~seen, -torch.inf)  # type: ignore[operator]
        parts.append(_segment_product(asked, keys, values, seen if added is None else added, scale, dropout))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _segment_product(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    return dense_product(query, key, value, mask, dropout, mask is None and query.shape[2] > 1, scale)
