"""The patterns of the heads of a layer, and what they let queries see as a mask.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor

from .device_constants import constant_on
from .pattern import Pattern, kept_tensors
from .rows import Rows
from .terms import Band


@dataclass(frozen=True)
class HeadPatterns:
    """The patterns of the query heads of a layer.

    Attributes:
        patterns: the distinct ones.
        heads: for each query head the index of its pattern.
    """

    patterns: tuple[Pattern, ...]
    heads: tuple[int, ...]

    def __hash__(self) -> int:  # once: layers look up by it in every call
        found = self.__dict__.get("_hash")
        if found is None:
            found = hash((self.patterns, self.heads))
            object.__setattr__(self, "_hash", found)
        return int(found)

    def __reduce__(self) -> tuple[Any, ...]:  # strings have other hashes in other processes
        return HeadPatterns, (self.patterns, self.heads)

    @classmethod
    def of(cls, patterns: Sequence[Pattern], heads: int) -> HeadPatterns:
        """Return the patterns of ``heads`` heads, given one for all of them or one for each."""
        if len(patterns) not in (1, heads):
            raise ValueError(f"{len(patterns)} patterns for {heads} heads: give one for all, or one for each")
        distinct = tuple(dict.fromkeys(patterns))
        each = list(patterns) if len(patterns) == heads else list(patterns) * heads
        return cls(distinct, tuple(distinct.index(pattern) for pattern in each))

    @property
    def moves_along(self) -> bool:
        """True if only distances count, in every head."""
        return all(pattern.moves_along for pattern in self.patterns)

    @property
    def reads_length(self) -> bool:
        """True if what a head sees depends on the number of tokens in the row."""
        return any(term.reads_length for pattern in self.patterns for term in pattern.terms)

    @property
    def length_step(self) -> int:
        """Rows with the same number of steps, rounded up, see the same, if the heads read lengths."""
        return math.gcd(*(t.length_step for p in self.patterns for t in p.terms if t.reads_length))

    @property
    def causal(self) -> bool:
        """True if no head sees keys behind the query."""
        return all(pattern.causal for pattern in self.patterns)

    @cached_property
    def nearest(self) -> tuple[int, ...] | None:
        """How many nearest keys each query head sees, the query's own among them; None if some see others."""
        counts = [_nearest_of(pattern) for pattern in self.patterns]
        return None if None in counts else tuple(counts[kind] for kind in self.heads)  # type: ignore[misc]

    def is_full(self, length: int) -> bool:
        """Return True if every head sees all that the model allows in a row of ``length`` tokens."""
        return _is_full(self, length)


def _nearest_of(pattern: Pattern) -> int | None:
    if len(pattern.terms) != 1 or pattern.repeats or type(pattern.terms[0]) is not Band:
        return None
    term: Any = pattern.terms[0]
    behind = not pattern.causal and term.after != 0
    return None if behind or term.step != 1 or term.before is None else term.before + 1


@lru_cache(maxsize=256)
def _is_full(heads: HeadPatterns, length: int) -> bool:
    return all(pattern.is_full(length) for pattern in heads.patterns)


def seen_mask(heads: HeadPatterns, count: int, length: int, rows: Rows | None, device: torch.device) -> Tensor:
    """Return bool ``[B or 1, H or 1, count, length]``: what the queries see."""
    if rows is None:
        if count == length:
            return _whole_mask(heads, length, device)
        key = torch.arange(length, device=device)
        return seen_by_head(heads, key[None, -count:, None], key[None, None, :], length)
    start = rows.offset if count != length else 0
    key = rows.positions()
    segments_k = rows.segments
    segments_q = segments_k[:, start : start + count]
    lengths: Any = length
    if heads.reads_length:
        lengths = (segments_k[:, :, None] == segments_q[:, None, :]).sum(1)[:, :, None]
    seen = seen_by_head(heads, key[:, start : start + count, None], key[:, None, :], lengths)
    own = (segments_q[:, :, None] == segments_k[:, None, :]) & (segments_q >= 0)[:, :, None]
    return seen & own[:, None]


@kept_tensors(16)
def _whole_mask(heads: HeadPatterns, length: int, device: torch.device) -> Tensor:
    key = torch.arange(length, device=device)
    return seen_by_head(heads, key[None, :, None], key[None, None, :], length)


def seen_by_head(heads: HeadPatterns, query: Tensor, key: Tensor, length: Any) -> Tensor:
    """Return ``Pattern.sees`` of each head, ``[..., H or 1, N, M]``: H only if the heads have several patterns.

    Args:
        heads: the patterns.
        query, key: positions, of shapes that broadcast to ``[B, N, M]``.
        length: number of tokens in the row, or one for each that broadcasts as well.
    """
    shape = torch.broadcast_shapes(query.shape, key.shape)
    seen = torch.stack([pattern.sees(query, key, length).expand(shape) for pattern in heads.patterns], 1)
    return seen if len(heads.patterns) == 1 else seen[:, list(heads.heads)]


def weight_bias(heads: HeadPatterns, count: int, length: int, rows: Rows | None, query: Tensor) -> Tensor | None:
    """Return the logarithm of how many times pairs count, ``[B or 1, H or 1, count, length]``; None if once."""
    if not any(pattern.repeats for pattern in heads.patterns):
        return None
    total: Any = 0
    for index in range(max(len(pattern.repeats) for pattern in heads.patterns)):
        each = [pattern.repeats[index : index + 1] for pattern in heads.patterns]
        terms = tuple(Pattern(tuple(term for term, _ in own)) for own in each)
        often = tuple(own[0][1] if own else 0 for own in each)
        of_heads = often if len(terms) == 1 else tuple(often[head] for head in heads.heads)
        own = constant_on(of_heads, query.device)[:, None, None]
        total = total + seen_mask(HeadPatterns(terms, heads.heads), count, length, rows, query.device) * own
    return torch.log1p(total.to(torch.promote_types(query.dtype, torch.float32))).to(query.dtype)


def as_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a bool or additive mask as an additive one."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
