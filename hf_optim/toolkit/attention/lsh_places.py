"""Which tokens see each other in a round of LSH attention: tokens sorted by bucket and cut into chunks.

Each token of a round has a *code*, such that a query sees a key if the difference of their codes, query less key, is
from ``-after`` to ``before``. Three schemes make codes:

- ``bucket``: chunks are cut in each bucket, by the number of tokens of the bucket that precede a token. What a token
  sees depends on earlier tokens alone. In a causal model the first ``chunk`` tokens see all tokens before them.
- ``paper``: all tokens sorted by bucket, then position, are cut into chunks. Tokens of lower buckets move the borders
  of all chunks behind them, so in a causal model later tokens decide which of the earlier ones a token sees.
- ``trax``: as ``paper``; in addition the first chunk of a round is followed, backwards, by the last one of the round
  before it (the first round by the last), and a key that several rounds find counts several times.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

BUCKET, PAPER, TRAX = "bucket", "paper", "trax"
MOST_BUCKETS = 2**14
NOWHERE = -(2**30)  # code of padding; codes and their differences are those of an int32


@dataclass(frozen=True)
class LshScheme:
    """How tokens are hashed, sorted and cut.

    Attributes:
        scheme: ``bucket``, ``paper`` or ``trax``.
        factors: of the number of buckets: even, or ``(1,)`` for one bucket.
        rounds: of hashing.
        chunk: tokens of a chunk.
        before, after: chunks on either side of its own that a token sees; in causal models ``after`` is 0.
        heads, width: of the vectors that are hashed.
        seed: of the rotations.
        redraw: draw other rotations in each step of training.
    """

    scheme: str
    factors: tuple[int, ...]
    rounds: int
    chunk: int
    before: int = 1
    after: int = 0
    heads: int = 1
    width: int = 1
    seed: int = 0
    redraw: bool = False

    @property
    def buckets(self) -> int:
        """Number of buckets of a round."""
        return prod(self.factors)

    @property
    def counts_once(self) -> bool:
        """True if a key that several rounds find counts once."""
        return self.scheme != TRAX

    def beside(self, causal: bool) -> tuple[int, int]:
        """Return how many chunks of sorted tokens, before and behind that of a query, may hold a key that it sees.

        Chunks that are cut in a bucket begin anywhere in those of all sorted tokens, so that they reach one further.
        """
        own = int(self.scheme == BUCKET)
        return self.before + own, 0 if causal and own else self.after + own

    @property
    def step(self) -> int:
        """Difference of the codes of neighbouring buckets in the ``bucket`` scheme; codes are below 2^30."""
        return 2**30 // (self.buckets + 1)

    @property
    def most_seen(self) -> int:
        """Keys that a query of a causal model sees at most."""
        return self.rounds * (self.before + 1) * self.chunk


def sorted_tokens(buckets: Tensor) -> Tensor:
    """Return the tokens in the order of their buckets, those of a bucket in their own order, int64 ``[..., n]``."""
    count = buckets.shape[-1]
    place = torch.arange(count, device=buckets.device)
    return (buckets * count + place).argsort(-1)


def rank_in_bucket(ordered: Tensor) -> Tensor:
    """Return how many tokens of its bucket precede each token, of buckets in ascending order ``[..., n]``."""
    place = torch.arange(ordered.shape[-1], device=ordered.device).expand(ordered.shape)
    begins = torch.ones_like(ordered, dtype=torch.bool)
    begins[..., 1:] = ordered[..., 1:] != ordered[..., :-1]
    return place - torch.where(begins, place, 0).cummax(-1).values


def codes_in_order(ordered: Tensor, scheme: LshScheme, earlier: Tensor | None = None) -> Tensor:
    """Return the codes of sorted tokens, int32 ``[..., n]``.

    Args:
        ordered: buckets in ascending order; those from ``scheme.buckets`` on are padding.
        scheme: says how chunks are cut.
        earlier: int ``[..., buckets]``: tokens of each bucket in a cache; for the ``bucket`` scheme.
    """
    if scheme.scheme == BUCKET:
        rank = rank_in_bucket(ordered)
        if earlier is not None:
            rank = rank + earlier.long().gather(-1, ordered.clamp_max(scheme.buckets - 1))
        codes = ordered * scheme.step + rank // scheme.chunk
    else:
        codes = torch.arange(ordered.shape[-1], device=ordered.device).expand(ordered.shape) // scheme.chunk
    return codes.masked_fill(ordered >= scheme.buckets, NOWHERE).int()


def with_padding(buckets: Tensor, lengths: Tensor | None, scheme: LshScheme, causal: bool) -> Tensor:
    """Return buckets ``[R, H, rounds, n]`` with padding behind all others; ``lengths`` are tokens of each row.

    In encoders a row of at most ``chunk`` tokens has one bucket: its attention is full.
    """
    count = buckets.shape[-1]
    if scheme.scheme == BUCKET and not causal:
        if lengths is None:
            buckets = buckets if count > scheme.chunk else torch.zeros_like(buckets)
        else:
            buckets = buckets.masked_fill((lengths <= scheme.chunk)[:, None, None, None], 0)
    if lengths is None:
        return buckets
    padding = torch.arange(count, device=buckets.device) >= lengths[:, None]
    return buckets.masked_fill(padding[:, None, None], scheme.buckets)


def codes_of(buckets: Tensor, scheme: LshScheme, earlier: Tensor | None = None) -> Tensor:
    """Return the codes of tokens in their own order, int32 ``[..., n]``; arguments as in ``codes_in_order``."""
    order = sorted_tokens(buckets)
    codes = codes_in_order(buckets.gather(-1, order), scheme, earlier)
    return torch.empty_like(codes).scatter_(-1, order, codes)


def seen_in_round(query: Tensor, key: Tensor, scheme: LshScheme) -> Tensor:
    """Return True where a query sees a key in a round, given their codes of shapes that broadcast."""
    difference = query - key
    return (difference <= scheme.before) & (difference >= -scheme.after)


def times_seen(queries: Tensor, keys: Tensor, lengths: Tensor, scheme: LshScheme) -> Tensor:
    """Return how often queries see keys in all rounds, int64 ``[R, H, N, n]``; causality and padding left out.

    Args:
        queries: codes ``[R, H, rounds, N]``.
        keys: codes ``[R, H, rounds, n]``.
        lengths: int64 ``[R]``: tokens of each row.
        scheme: if it counts keys once, the result is at most 1.
    """
    rounds = keys.shape[2]
    if scheme.counts_once:
        seen = [seen_in_round(queries[:, :, r, :, None], keys[:, :, r, None, :], scheme) for r in range(rounds)]
        return torch.stack(seen).any(0).long()
    chunks = chunks_of_rows(lengths, scheme)[:, None, None, None]
    queries, keys = queries.long(), keys.long()
    total: Tensor | int = 0
    for r in range(rounds):
        for other in range(rounds):
            apart = (queries[:, :, r, :, None] + r * chunks) - (keys[:, :, other, None, :] + other * chunks)
            for back in range(-scheme.after, scheme.before + 1):
                total = total + ((apart - back) % (rounds * chunks) == 0).long()
    assert isinstance(total, Tensor)
    return total


def chunks_of_rows(lengths: Tensor, scheme: LshScheme) -> Tensor:
    """Return how many chunks the tokens of each row fill, int64 ``[R]``, at least 1."""
    return ((lengths + scheme.chunk - 1) // scheme.chunk).clamp_min(1)
