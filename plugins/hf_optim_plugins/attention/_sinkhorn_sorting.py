"""Sorting of blocks by a matrix that is learned: Sinkhorn normalization, and the networks that score blocks.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._recomputed import Recomputed

HIDDEN = -1e30  # the logarithm of a weight that is zero
FLOOR = 1e-6  # added to scores that were cut off at zero


def sinkhorn(scores: Tensor, iterations: int, valid: Tensor | None = None) -> Tensor:
    """Return weights whose columns sum to 1, and whose rows nearly do: rows and columns are normalized in turn.

    Args:
        scores: ``[..., N, N]``, logarithms of positive numbers.
        iterations: of both; the rows come nearer to 1 with each.
        valid: bool, broadcasts to ``[..., N]``: blocks that take part; the weights of others are 0. None: all.
    """
    pairs = None if valid is None else valid[..., None] & valid[..., None, :]
    log = scores
    for _ in range(iterations):
        for axis in (-1, -2):
            if pairs is not None:
                log = log.masked_fill(~pairs, HIDDEN)
            log = log - log.logsumexp(axis, keepdim=True)
    weights = log.exp()
    return weights if pairs is None else weights.masked_fill(~pairs, 0)


def of_past(scores: Tensor) -> Tensor:
    """Return the softmax of each row of ``[..., N, N]`` over the columns before its own; the first row is 0.

    Columns cannot be normalized in a causal model: their sums would hold later rows.
    """
    place = torch.arange(scores.shape[-1], device=scores.device)
    before = place[:, None] > place
    return scores.masked_fill(~before, HIDDEN).softmax(-1).masked_fill(~before, 0)


def gumbel(shape: tuple[int, ...], seed: int) -> Tensor:
    """Return Gumbel noise, float32 on the CPU, the same for a seed."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.rand(shape, generator=generator).clamp(1e-7, 1 - 1e-7)
    return -(-drawn.log()).log()


class AttentionSorter(nn.Module):
    """Scores of blocks as of tokens: ``R_ij = (W_q x_i) (W_k y_j) / sqrt(D)``, with matrices that begin as identity.

    Attributes:
        query, key: ``[G, D, D]``.
    """

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(heads, width, width))
        self.key = nn.Parameter(torch.empty(heads, width, width))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Make both identity."""
        with torch.no_grad():
            for weight in (self.query, self.key):
                weight.copy_(torch.eye(weight.shape[1]).expand_as(weight))

    def forward(self, asked: Tensor, own: Tensor, held: Tensor) -> Tensor:
        """Return ``[R, G, N, M]`` of what blocks ask ``[R, G, N, D]`` and what blocks hold ``[R, G, M, D]``."""
        query, key = asked @ self.query.to(asked), held @ self.key.to(held)
        return query @ key.transpose(2, 3) * asked.shape[-1] ** -0.5


class LinearSorter(nn.Module):
    """The paper's sort network: ``R_i = W_B relu(W_P [x_i, y_i] + b_P) + b_B``, for at most ``blocks`` blocks.

    Attributes:
        inner: ``[G, 2 D, D]``; inner_bias: ``[G, 1, D]``.
        outer: ``[G, D, blocks]``; outer_bias: ``[G, 1, blocks]``.
    """

    def __init__(self, heads: int, width: int, blocks: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.inner = nn.Parameter(torch.empty(heads, 2 * width, width))
        self.inner_bias = nn.Parameter(torch.empty(heads, 1, width))
        self.outer = nn.Parameter(torch.empty(heads, width, blocks))
        self.outer_bias = nn.Parameter(torch.empty(heads, 1, blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the matrices, of a variance of 1 / inputs, and make the biases 0."""
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for weight in (self.inner, self.outer):
                if not weight.is_meta:
                    drawn = torch.randn(weight.shape, generator=generator, dtype=torch.float32)
                    weight.copy_(drawn * weight.shape[1] ** -0.5)
            for bias in (self.inner_bias, self.outer_bias):
                bias.zero_()

    def forward(self, asked: Tensor, own: Tensor, held: Tensor) -> Tensor:
        """Return ``[R, G, N, M]`` of summaries of queries and keys ``[R, G, N, D]``, for M blocks of ``held``."""
        count, most = held.shape[2], self.outer.shape[2]
        if count > most:
            raise ValueError(
                f"the sort network of this model is for {most} blocks, and got a row of {count}: give it shorter rows"
            )
        inner = torch.cat([asked, own], -1) @ self.inner.to(asked) + self.inner_bias.to(asked)
        return (inner.relu() @ self.outer.to(asked) + self.outer_bias.to(asked))[..., :count]


class Sorter(nn.Module):
    """The network that sorts, with temperature and noise.

    Noise is drawn in training alone, from a seed and a count of the batches; a forward that is computed again in the
    backward (gradient checkpointing) draws the noise of the first time. Ranks of ``torch.distributed`` draw their own.

    Attributes:
        network: see above.
        draws: buffer, int64: the batches that noise was drawn for.
    """

    draws: Tensor

    def __init__(
        self, network: nn.Module, positive: str, temperature: float, iterations: int, noise: float, seed: int
    ) -> None:
        super().__init__()
        self.network = network
        self.positive, self.temperature, self.iterations = positive, temperature, iterations
        self.noise, self.seed = noise, seed
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        self._drawn: int | None = None  # ``draws`` without waiting for the device
        self._forwards = Recomputed(64)

    def reset_parameters(self) -> None:
        """Count from 0."""
        self.draws.zero_()
        self._drawn = None

    def scores(self, asked: Tensor, own: Tensor, held: Tensor) -> Tensor:
        """Return logarithms of how well blocks fit, ``[R, G, N, M]``, in float32 or wider, over the temperature."""
        wide = [part if part.dtype == torch.float64 else part.float() for part in (asked, own, held)]
        found = self.network(*wide)
        if self.positive == "relu":
            found = (found.relu() + FLOOR).log()
        if self.training and self.noise:
            number = self._forwards.value(self._next)
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if spread else 0
            seed = (self.seed * 1_000_003 + number * 4099 + rank) % 2**63
            found = found + self.noise * gumbel(tuple(found.shape), seed).to(found)
        return found / self.temperature

    def _next(self) -> int:
        """Count a batch that noise is drawn for, and return its number."""
        self._drawn = (int(self.draws) if self._drawn is None else self._drawn) + 1
        return self._drawn

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        if self._drawn is not None:
            self.draws.fill_(self._drawn)
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._drawn = None
        super()._load_from_state_dict(*args, **kwargs)
