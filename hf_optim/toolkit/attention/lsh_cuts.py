"""Tokens sorted by bucket and cut into chunks, each chunk beside its neighbours, and back again.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

from .lsh_places import NOWHERE, LshScheme, codes_in_order, seen_in_round, sorted_tokens


class LshCut:
    """Tokens ``[R, H, n, ...]`` in another order, int64 ``[R, H, n]``, cut into chunks, and back again."""

    def __init__(self, order: Tensor, chunk: int) -> None:
        self.rows, self.heads, self.count = order.shape
        self.chunk, self.short = chunk, -self.count % chunk
        first = torch.arange(self.rows * self.heads, device=order.device)[:, None] * self.count
        flat = order.flatten(0, 1)
        self._from = (flat + first).flatten()
        place = torch.arange(self.count, device=order.device).expand_as(flat)
        back = torch.empty_like(flat).scatter_(-1, flat, place)
        self._back = (back + first).flatten()

    def take(self, part: Tensor) -> Tensor:
        """Return ``[R, H, n, D]`` as ``[R, H, C, m, D]``, zero behind the last token."""
        moved = part.flatten(0, 2).index_select(0, self._from).unflatten(0, (self.rows, self.heads, self.count))
        return functional.pad(moved, (0, 0, 0, self.short)).unflatten(2, (-1, self.chunk))

    def split(self, part: Tensor, filler: int) -> Tensor:
        """Return ``[R, H, n]`` that is in the order already as ``[R, H, C, m]``."""
        return functional.pad(part, (0, self.short), value=filler).unflatten(2, (-1, self.chunk))

    def put(self, part: Tensor) -> Tensor:
        """Return ``[R, H, C, m, D]`` as ``[R, H, n, D]`` in the order of the tokens."""
        tokens = part.flatten(2, 3)[:, :, : self.count].flatten(0, 2)
        return tokens.index_select(0, self._back).unflatten(0, (self.rows, self.heads, self.count))


def beside(part: Tensor, sides: tuple[int, int], filler: int = 0) -> Tensor:
    """Return each chunk of ``[R, H, C, m, ...]`` with its neighbours, ``[R, H, C, W, ...]``, ``filler`` at the ends."""
    count = part.shape[2]
    padded = functional.pad(part, [0, 0] * (part.dim() - 3) + [*sides], value=filler)
    return torch.cat([padded[:, :, i : i + count] for i in range(sum(sides) + 1)], 3)


def summed_from_beside(part: Tensor, sides: tuple[int, int]) -> Tensor:
    """Return the gradient of chunks ``[R, H, C, m, D]`` from that of ``beside``, ``[R, H, C, W, D]``."""
    count, each = part.shape[2], part.unflatten(3, (sum(sides) + 1, -1))
    total = part.new_zeros(*part.shape[:2], count + sum(sides), *each.shape[4:])
    for i in range(sum(sides) + 1):
        total[:, :, i : i + count] += each[:, :, :, i]
    return total[:, :, sides[0] : sides[0] + count]


def sorted_rounds(buckets: Tensor, scheme: LshScheme, causal: bool) -> Iterator[tuple[LshCut, Tensor, Tensor | None]]:
    """Yield for each round how tokens are cut, and what chunks see of themselves and their neighbours.

    A key that several rounds find is seen in the first of them alone.

    Args:
        buckets: int64 ``[R, H, rounds, n]``, those of padding behind all others.
        scheme: says which pairs are computed; one that counts keys once.
        causal: a token sees no later ones.

    Yields:
        The cut; bool ``[R, H, C, m, W]``, True for pairs that are seen; and True for pairs of a token with itself,
        which are seen in the first round: None in the others.
    """
    sides, earlier = scheme.beside(causal), list[Tensor]()
    for r in range(scheme.rounds):
        order = sorted_tokens(buckets[:, :, r])
        codes = codes_in_order(buckets[:, :, r].gather(-1, order), scheme)
        cut = LshCut(order, scheme.chunk)
        at = cut.split(order.int(), -1)[..., None]
        places = beside(at[..., 0], sides, -1)[..., None, :]
        seen = _seen_beside(cut.split(codes, NOWHERE), sides, scheme)
        if causal:
            seen &= places <= at
        for known in earlier:
            seen &= ~_seen_beside(cut.split(known.gather(-1, order), NOWHERE), sides, scheme)
        if scheme.rounds > r + 1:
            earlier.append(torch.empty_like(codes).scatter_(-1, order, codes))
        yield cut, seen, at == places if r == 0 else None


def _seen_beside(codes: Tensor, sides: tuple[int, int], scheme: LshScheme) -> Tensor:
    return seen_in_round(codes[..., :, None], beside(codes, sides, NOWHERE)[..., None, :], scheme)
