"""The specification: attention of each query to a run of places at which keys lie, in PyTorch over all pairs.

Each head of each batch row puts queries and keys at places, in an order for each *round*, and a query sees the keys
from place ``low`` to place ``high``: tokens near it in their bucket (Kitaev et al. 2020, arXiv:2001.04451), or the last
ones of its cluster (Roy et al. 2020, arXiv:2003.05997). A pair that several rounds find counts in the first alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Score of a token with itself where it counts only if the query sees nothing else.
ALONE = 1e5
# Added to the mean square of a query whose direction is its key.
EPSILON = 1e-6


class Seen(NamedTuple):
    """Which pairs of a run see each other.

    Attributes:
        before, after: a pair with a difference of codes, query less key, from ``-after`` to ``before`` was found by
            that round. Read if there are several rounds.
        causal: a query sees keys of tokens up to its own.
        unit: keys are the queries at unit length, ``q / sqrt(mean(q^2) + 1e-6) / sqrt(D)``, and a token sees itself
            only where it sees no other; orders of queries and keys are the same.
        own: a query also sees the key of its own token, which is in no run.
        near: the first so many tokens see all tokens before them, beside what their runs say (with ``unit`` and
            ``causal``).
        placed: every token has a place in each order: nothing is filled with zeros for those without.
        last: a run that is not empty ends with the place of its query, and its places are in the order of their tokens,
            so that no later one is in it; with ``unit``, whose orders are the same.
    """

    before: int = 0
    after: int = 0
    causal: bool = False
    unit: bool = False
    own: bool = False
    near: int = 0
    placed: bool = False
    last: bool = False


def run_attention(
    query: Tensor, key: Tensor, value: Tensor, order_q: Tensor, order_k: Tensor, low: Tensor, high: Tensor,
    codes: Tensor, seen: Seen, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the attention of ``query``, and the logarithm to base 2 of the sum of exponentials.

    Args:
        query: ``[B, H, N, D]``.
        key: ``[B, G, N, D]``; with ``unit`` the query, of which only the shape is read.
        value: ``[B, G, N, Dv]``; query head ``h`` reads head ``h // (H // G)``.
        order_q, order_k: int32 ``[B, H, rounds, N]`` and ``[B, H or G, rounds, N]``: tokens at places, -1 for none.
        low, high: int32 ``[B, H, rounds, N]``: the run of places of keys that the query at a place sees.
        codes: int32 ``[B, H, rounds, N]`` of tokens; not read for one round.
        seen: see ``Seen``.
        scale: of the scores.

    Returns:
        out ``[B, H, N, Dv]`` in the dtype of the query, and lse ``[B, H, N]``, float32 or float64. A query that sees
        nothing has out 0 and lse ``-inf``.
    """
    scores, values = _scores(query, key, value, *pairs_of(order_q, order_k, low, high, codes, seen), seen, scale)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    return (weights @ values).to(query.dtype), lse * 1.4426950408889634


def pairs_of(
    order_q: Tensor, order_k: Tensor, low: Tensor, high: Tensor, codes: Tensor, seen: Seen
) -> tuple[Tensor, Tensor]:
    """Return which token sees which, and which of these pairs are of one token: bool ``[B, H, N, N]``."""
    B, H, rounds, N = order_q.shape
    order_k = order_k.repeat_interleave(H // order_k.shape[1], 1)
    place = torch.arange(N, device=low.device)
    b, h = (torch.arange(size, device=low.device) for size in (B, H))
    b, h = b[:, None, None, None], h[:, None, None]
    found = torch.zeros(B, H, N, N, dtype=torch.bool, device=low.device)
    for r in range(rounds):
        own = (place >= low[:, :, r, :, None]) & (place <= high[:, :, r, :, None])
        own &= (order_q[:, :, r, :, None] >= 0) & (order_k[:, :, r, None] >= 0)
        rows, columns = (part[:, :, r].long().where(part[:, :, r] >= 0, N) for part in (order_q, order_k))
        by_token = own.new_zeros(B, H, N + 1, N + 1)
        by_token[b, h, rows[..., None], columns[:, :, None]] = own
        found |= by_token[:, :, :N, :N]
    if seen.near:
        found |= (place[:, None] < seen.near) & (place <= place[:, None])
    if seen.causal:
        found &= place <= place[:, None]
    same = torch.eye(N, dtype=torch.bool, device=low.device)
    if seen.own:
        placed = torch.zeros(B, H, N + 1, dtype=torch.bool, device=low.device)
        placed.scatter_(2, order_q[:, :, 0].long().where(order_q[:, :, 0] >= 0, N), True)
        found |= same & placed[:, :, :N, None]
    return found, found & same


def _scores(
    query: Tensor, key: Tensor, value: Tensor, found: Tensor, same: Tensor, seen: Seen, scale: float
) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    q, group = query.to(wide), query.shape[1] // value.shape[1]
    if seen.unit:
        key = (q * (q.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * q.shape[-1] ** -0.5).to(query.dtype)
    keys = key.to(wide).repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = (q @ keys.mT) * scale
    if seen.unit:
        scores = torch.where(same, -ALONE, scores)
    return scores.masked_fill(~found, float("-inf")), value.to(wide).repeat_interleave(group, 1)


def gradients(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *given: Tensor, seen: Seen, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value; that of the key is empty with ``unit``."""
    order_q, order_k, low, high, codes = given
    found, same = pairs_of(order_q, order_k, low, high, codes, seen)
    scores, values = _scores(query, key, value, found, same, seen, scale)
    lse = scores.logsumexp(-1, keepdim=True)
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0))
    slope = grad_out.to(scores)
    of_value = (weights.mT @ slope).unflatten(1, (value.shape[1], -1)).sum(2)
    inner = weights * (slope @ values.mT - (slope * (weights @ values)).sum(-1, keepdim=True)) * scale
    q, wide = query.to(scores), key.to(scores)
    if seen.unit:
        inner = inner.masked_fill(same, 0.0)  # that score is a constant
        mean = q.square().mean(-1, keepdim=True) + EPSILON
        factor = mean.rsqrt() * q.shape[-1] ** -0.5
        of_unit = inner.mT @ q
        along = (q * of_unit).sum(-1, keepdim=True) / (mean * q.shape[-1])
        of_query = inner @ (q * factor).to(query.dtype).to(scores) + (of_unit - q * along) * factor
        return of_query.to(query.dtype), query.new_empty(0), of_value.to(value.dtype)
    group = query.shape[1] // key.shape[1]
    of_query = inner @ wide.repeat_interleave(group, 1)
    of_key = (inner.mT @ q).unflatten(1, (key.shape[1], -1)).sum(2)
    return of_query.to(query.dtype), of_key.to(key.dtype), of_value.to(value.dtype)
