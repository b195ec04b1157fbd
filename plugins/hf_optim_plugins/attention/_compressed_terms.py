"""What queries see of compressed windows and of raw tokens, as terms: lists of blocks follow from them.

Windows and tokens are keys of two sources, so each has a layout of its own. Positions of a row without padding.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hf_optim.toolkit.attention import Spans, Term


@dataclass(frozen=True)
class SeenWindows(Term):
    """Windows of ``stride`` tokens that a query sees as one key: key j is the window from position ``j stride`` on.

    A causal query sees those that end ``local`` positions before it or earlier; others see all but those with a token
    less than ``local`` positions away.
    """

    stride: int
    local: int
    causal: bool

    def count(self, length: int) -> int:
        """Return how many windows a row of ``length`` tokens has."""
        return max(0, length - self.local * self.causal) // self.stride

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        if self.causal:
            return key < (query + 1 - self.local).clamp_min(0) // self.stride
        if not self.local:
            return (key >= 0) & (query >= 0)
        return ~is_near(query, key, self.stride, self.local)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        zero, before = torch.zeros_like(first), (last + 1 - self.local).clamp_min(0) // self.stride
        if self.causal:
            return [(zero, before)]
        count = torch.full_like(first, self.count(length))
        return [(zero, before), ((first + self.local) // self.stride, count)] if self.local else [(zero, count)]

    def orders(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        return torch.arange(length, device=device), torch.arange(self.count(length), device=device)

    @property
    def order(self) -> tuple[str, int]:
        return ("windows", self.stride)


@dataclass(frozen=True)
class RawTokens(Term):
    """Tokens that a query sees by themselves: those that are in no window of ``SeenWindows``, up to a causal query."""

    stride: int
    local: int
    causal: bool

    @property
    def reads_length(self) -> bool:
        return not self.causal

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        if self.causal:
            return (key <= query) & (key >= (query + 1 - self.local).clamp_min(0) // self.stride * self.stride)
        rest = (key >= length // self.stride * self.stride) & (query >= 0)
        return rest | is_near(query, key // self.stride, self.stride, self.local) if self.local else rest

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        low = (first + 1 - self.local).clamp_min(0) // self.stride * self.stride
        if self.causal:
            return [(low, last + 1)]
        rest = (torch.full_like(first, length // self.stride * self.stride), torch.full_like(first, length))
        high = ((last + self.local - 1) // self.stride + 1) * self.stride
        return [(low, high), rest] if self.local else [rest]


def is_near(position: Tensor, window: Tensor, stride: int, local: int) -> Tensor:
    """Return True where a token of the window is less than ``local`` positions away."""
    return (window * stride < position + local) & ((window + 1) * stride > position - local + 1)
