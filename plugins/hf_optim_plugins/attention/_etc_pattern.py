"""The pattern of ``etc``: global-local attention in four pieces. This file is stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_optim.toolkit.attention import (
    Band,
    GlobalAttachment,
    GlobalTokens,
    Pattern,
    PatternConfig,
    Pieces,
    Spans,
    Term,
    flag,
    static_tokens,
    whole,
)

PIECES = ("g2g", "g2l", "l2g", "l2l")


@dataclass(frozen=True)
class GlobalLocal(Term):
    """Global tokens at fixed positions, the others with those at most ``radius`` away, in the pieces that are on."""

    tokens: GlobalTokens
    radius: int
    pieces: Pieces

    @property
    def reads_length(self) -> bool:
        return self.tokens.reads_length

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        is_global, of_global = self.tokens.holds(query, length), self.tokens.holds(key, length)
        on = self.pieces
        near = (query - key).abs() <= self.radius
        wide = self._span(query, length) == self._span(key, length) if on.own_span else torch.ones_like(near)
        to_global = torch.where(is_global, on.g2g, on.l2g)
        to_long = torch.where(is_global, wide & on.g2l, near & on.l2l)
        return torch.where(of_global, to_global, to_long)

    def _span(self, position: Tensor, length: int) -> Tensor:
        """Return how many global tokens there are up to a position."""
        tokens, end = self.tokens, length - self.tokens.last
        last = end.clamp_min(tokens.first) if isinstance(end, Tensor) else max(end, tokens.first)
        count = (position + 1).clamp_max(tokens.first)
        for place in sorted(set(tokens.positions)):
            if place >= tokens.first:
                count = count + ((position >= place) & (place < end)).long()
        return count + (position - last + 1).clamp_min(0)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        near = Band(self.radius, self.radius).spans(first, last, length) if self.pieces.l2l else []
        return near + self.tokens.spans(first, last, length)

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        return (key >= query - self.radius) | self.tokens.stays(key, query, length)

    def most_seen(self, length: int) -> int:
        return min(self.radius + 1 + self.tokens.most_seen(length), length)

    def holds_all(self, length: int, causal: bool) -> bool:
        return self.pieces == Pieces() and self.radius >= length - 1


def pieces(settings: Mapping[str, Any]) -> Pieces:
    """Return which pieces are on. Raises ``ValueError`` for settings that are not true or false."""
    return Pieces(*(flag(settings, name) for name in (*PIECES, "hard_g2l")))


def near(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of tokens that are not global: the ``radius`` tokens on each side, and the token itself."""
    radius = whole(settings, "radius", low=1)
    return [Pattern((Band(radius, radius),), causal)]


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern with the global tokens at fixed positions."""
    tokens = static_tokens(settings) or GlobalTokens()
    return [Pattern((GlobalLocal(tokens, whole(settings, "radius", low=1), pieces(settings)),), causal)]


ATTACHMENT = GlobalAttachment("hf_optim_etc", build, near=near, pieces=pieces)


class EtcBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
