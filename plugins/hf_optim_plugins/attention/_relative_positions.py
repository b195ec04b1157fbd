"""Relative positions of Transformer-XL: scores that depend on what a key holds and on how far away it is.

    A[i, j] = (q_i + u)^T k_j + (q_i + v)^T W_r r(i - j),    r(d) = [sin(d w) | cos(d w)],  w_t = 10000^(-2t / d_model)

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

BASE = 10000.0


def sinusoids(count: int, width: int, clamp: int, like: Tensor) -> Tensor:
    """Return r(d) for the distances 0 to ``count - 1``, ``[count, width]``: sines, then cosines.

    Distances above ``clamp`` count as ``clamp``, unless it is 0. They are computed in float32, or in float64 if the
    dtype of ``like`` is that, and returned in its dtype.
    """
    about: Any = {"device": like.device, "dtype": torch.promote_types(like.dtype, torch.float32)}
    distance = torch.arange(count, **about)
    if clamp:
        distance = distance.clamp_max(clamp)
    frequency = BASE ** (-torch.arange(0, width, 2, **about) / width)
    angle = distance[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)[:, :width].to(like.dtype)


def shifted(scores: Tensor) -> Tensor:
    """Return scores by key of scores by distance, without a gather.

    Args:
        scores: ``[B, H, n, K]``: column t is the distance ``K - 1 - t``; the n queries are the last of K tokens.

    Returns:
        ``[B, H, n, K]``: column j is the key j. Behind a query it means nothing.
    """
    *rows, count, keys = scores.shape
    padded = functional.pad(scores, (1, 0)).reshape(*rows, keys + 1, count)
    return padded[..., 1:, :].reshape(*rows, count, keys)


class RelativeBiases(nn.Module):
    """The vectors u (``content``) and v (``position``) of all heads, each ``[H, D]``."""

    def __init__(self, heads: int, width: int, **about: Any) -> None:
        super().__init__()
        self.content = nn.Parameter(torch.zeros(heads, width, **about))
        self.position = nn.Parameter(torch.zeros(heads, width, **about))


class RelativePositions(nn.Module):
    """The weights of one attention: the projection ``W_r`` of distances, and u and v where they are its own.

    Args:
        model_width: of the sinusoids.
        heads, width: of the queries.
        clamp: the largest distance that is told apart; 0: all are.
        shared: u and v of another layer; None: this layer has its own.
    """

    def __init__(
        self, model_width: int, heads: int, width: int, clamp: int, shared: RelativeBiases | None = None, **about: Any
    ) -> None:
        super().__init__()
        self.clamp, self.model_width = clamp, model_width
        self.projection = nn.Linear(model_width, heads * width, bias=False, **about)
        own = RelativeBiases(heads, width, **about) if shared is None else None
        self.biases = own
        self.held = [shared or own]  # a list: not a second owner of the same weights

    def initialize(self, std: float, generator: torch.Generator | None = None) -> None:
        """Draw the projection and the biases that are its own from a normal distribution."""
        drawn = [self.projection.weight] + ([] if self.biases is None else list(self.biases.parameters()))
        with torch.no_grad():
            for weight in drawn:
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def content_query(self, query: Tensor) -> Tensor:
        """Return ``q + u``, ``[B, H, n, D]``."""
        return query + self.held[0].content[:, None].to(query)  # type: ignore[union-attr]

    def _by_distance(self, query: Tensor, count: int) -> Tensor:
        """Return ``(q + v)^T W_r r(d)`` for the distances 0 to ``count - 1``, ``[B, H, n, count]``."""
        table = sinusoids(count, self.model_width, self.clamp, query)
        projected = self.projection(table).unflatten(1, (query.shape[1], -1)).to(query.dtype)
        moved = query + self.held[0].position[:, None].to(query)  # type: ignore[union-attr]
        return moved @ projected.permute(1, 2, 0)

    def by_key(self, query: Tensor, memory: int) -> Tensor:
        """Return the scores of positions of the last n of ``memory + n`` tokens, ``[B, H, n, memory + n]``."""
        count = memory + query.shape[2]
        return shifted(self._by_distance(query, count).flip(3))

    def at(self, query: Tensor, distance: Tensor, most: int) -> Tensor:
        """Return the scores of positions at distances, ``[B, H, n, K]``.

        Args:
            query: ``[B, H, n, D]``.
            distance: int64 ``[1 or B, n, K]``; negative ones, and those from ``most`` on, mean nothing.
            most: distances that occur.
        """
        scores = self._by_distance(query, most)
        index = distance.clamp(0, most - 1)[:, None].expand(len(query), query.shape[1], -1, -1)
        return scores.gather(3, index)
