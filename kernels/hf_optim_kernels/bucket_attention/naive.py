"""The specification: attention of chunks of places to chunks nearby, in PyTorch.

Each head of each batch row puts tokens at *places* (sorted by a hash, or the members of clusters), which are cut into
chunks. A query sees the keys of its own chunk, of ``before`` chunks before and of ``after`` after it: LSH attention
(Kitaev et al. 2020, arXiv:2001.04451) with ``before`` 1, attention within clusters with 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# What is taken from the score of a token with itself: it counts only where the query sees nothing else.
ALONE = 1e5


class Buckets(NamedTuple):
    """How places are cut into chunks, and which pairs within their reach see each other.

    Attributes:
        width_q, width_k: places of a chunk, of queries and of keys.
        before, after: chunks that a query sees besides its own. No chunk is seen twice.
        wrap: the first chunk follows the last.
        causal: a query sees keys of tokens up to its own.
        no_self: a token sees itself only where it sees no other: its score with itself is lowered by 1e5.
        gathered: queries, keys, values and results have their rows by place; else by token.
    """

    width_q: int
    width_k: int
    before: int = 0
    after: int = 0
    wrap: bool = False
    causal: bool = False
    no_self: bool = False
    gathered: bool = False


def bucket_attention(
    query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of ``query`` to the keys that it sees, and the logarithm of the sum of its exponentials.

    Scores and sums are float32, or float64 if the query is. Query head ``h`` reads key head ``h // (H // G)``.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]`` and ``[B, G, M, Dv]``, with H a multiple of G (G = H if gathered).
        places_q, places_k: int32 ``[B, H, C width]``: the token at each place, -1 for none. By token, a token has one
            place of a head at most; gathered, N and M are the numbers of places, tokens only order the pairs, and with
            ``no_self`` all places of a token have the same key.
        scale: of the scores.

    Returns:
        out ``[B, H, N, Dv]`` in the dtype of the query, and lse ``[B, H, N]`` (natural logarithm), float32 or float64.
        A query that sees nothing has out 0 and lse ``-inf``.
    """
    seen, alone = visible(places_q, places_k, buckets, query.shape[2], key.shape[2])
    scores, _, values = _scores(query, key, value, seen, alone, scale)
    lse = scores.logsumexp(-1)
    return (_weights(scores, lse) @ values).to(query.dtype), lse


def gradients(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of ``query``, ``key`` and ``value`` for those of out and lse."""
    seen, alone = visible(places_q, places_k, buckets, query.shape[2], key.shape[2])
    scores, keys, values = _scores(query, key, value, seen, alone, scale)
    wide = scores.dtype
    weights, slope = _weights(scores, lse.to(wide)), grad_out.to(wide)
    delta = (slope * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide).masked_fill(lse == float("-inf"), 0.0)
    inner = weights * (slope @ values.mT - delta[..., None]) * scale
    grad_query = inner @ keys
    shares = (key.shape[1], query.shape[1] // key.shape[1])
    grad_key, grad_value = (
        each.unflatten(1, shares).sum(2) for each in (inner.mT @ query.to(wide), weights.mT @ slope)
    )
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def reach(buckets: Buckets, chunks: int) -> tuple[int, int]:
    """Return the chunks before and after that are seen of ``chunks``, none of them twice."""
    before = min(buckets.before, chunks - 1)
    return before, min(buckets.after, chunks - 1 - before if buckets.wrap else chunks - 1)


def visible(places_q: Tensor, places_k: Tensor, buckets: Buckets, N: int, M: int) -> tuple[Tensor, Tensor]:
    """Return which keys each query sees, and which of them are itself: bool ``[B, H, N, M]``."""
    B, H, size = places_q.shape
    chunks = size // buckets.width_q
    before, after = reach(buckets, chunks)
    device = places_q.device
    of_q = torch.arange(size, device=device) // buckets.width_q
    of_k = torch.arange(places_k.shape[2], device=device) // buckets.width_k
    distance = of_k[None, :] - of_q[:, None]
    if buckets.wrap and chunks:
        distance = (distance + before) % chunks - before
    near = (distance >= -before) & (distance <= after)
    one, other = places_q[..., None], places_k[:, :, None]
    seen = near & (one >= 0) & (other >= 0)
    if buckets.causal:
        seen = seen & (other <= one)
    same = seen & (one == other)
    if buckets.gathered:
        return seen, same & buckets.no_self
    found = seen.new_zeros(2, B, H, N + 1, M + 1)
    rows = places_q.long().where(places_q >= 0, N)[..., None]
    columns = places_k.long().where(places_k >= 0, M)[:, :, None]
    b, h = torch.arange(B, device=device)[:, None, None, None], torch.arange(H, device=device)[:, None, None]
    for number, pairs in enumerate((seen, same & buckets.no_self)):
        found[number, b, h, rows, columns] = pairs
    return found[0, :, :, :N, :M], found[1, :, :, :N, :M]


def _scores(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, alone: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    keys, values = (each.to(wide).repeat_interleave(group, 1) for each in (key, value))
    scores = (query.to(wide) @ keys.mT) * scale
    scores = torch.where(alone, scores - ALONE, scores)
    return scores.masked_fill(~seen, float("-inf")), keys, values


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Return the softmax; zeros for rows that see nothing.

    Scores of a token that sees itself alone are lowered by so much that only one over the number of its places is left
    of their digits: the same for each, as the places of a token have one key.
    """
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    lone = (lse < -ALONE / 2)[..., None] & (scores > float("-inf"))
    return torch.where(lone, 1.0 / (1.0 / torch.where(lone, weights, 1.0)).round(), weights)
