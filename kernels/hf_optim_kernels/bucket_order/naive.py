"""The specification: buckets of vectors, tokens sorted by bucket, and the run of places that each token sees.

Tokens of a *row* (of a batch, a head, and a round of hashing) are put in the order of their buckets, those of one
bucket in their own order. What a query sees is a run of neighbouring places.
"""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

# Bits of an entry of a vector beside its sign; its largest entry is 2^22.
VECTOR_BITS = 22
# Code of padding.
NOWHERE = -(2**30)


class Cut(NamedTuple):
    """How the tokens of a row are cut into chunks.

    Attributes:
        buckets: of a row; tokens of numbers from this on are padding.
        chunk: tokens of a chunk.
        before, after: chunks beside its own that a token sees.
        whole: chunks are cut over all sorted tokens; else in each bucket.
        causal: a token sees no later place; for chunks of single buckets, where later places are later tokens.
        step: difference of the codes of neighbouring buckets; not read if ``whole``.
        lonely: the first so many tokens see nothing.
    """

    buckets: int
    chunk: int
    before: int
    after: int = 0
    whole: bool = False
    causal: bool = False
    step: int = 0
    lonely: int = 0


class Runs(NamedTuple):
    """Places of a row and what is seen from them, each int32 ``[B, H, rounds, n]``.

    Attributes:
        order: the token at each place, -1 for padding, which is behind all others.
        low, high: the first and the last place that the query at a place sees; none if ``high`` is below ``low``.
        first, last: the first and the last place whose queries may see the key at a place.
        codes: of each token: a query sees a key if their difference is from ``-after`` to ``before``.
    """

    order: Tensor
    low: Tensor
    high: Tensor
    first: Tensor
    last: Tensor
    codes: Tensor


def hash_vectors(vectors: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Return buckets ``argmax([x R; -x R])``, int16 ``[B, H, rounds, n]``; the first of equal entries counts.

    Vectors are rounded to whole numbers, of which float64 holds all products and sums: the result is exact.

    Args:
        vectors: ``[B, H, n, D]``.
        rotations: int32 ``[H, D, rounds, sum(factors) / 2]`` below ``2^21``.
        factors: even, of the number of buckets: ``h_1 + f_1 h_2 + ...``, each hash with columns of its own.
    """
    exact = vectors.double()
    largest = exact.abs().amax(-1, keepdim=True)
    whole = (exact / torch.where(largest == 0, 1.0, largest) * 2**VECTOR_BITS).round()
    products = (whole @ rotations.flatten(2).double()).unflatten(-1, (rotations.shape[2], -1))
    buckets, begin = torch.zeros(products.shape[:-1], dtype=torch.int64, device=vectors.device), 0
    for number, factor in enumerate(factors):
        part = products[..., begin : begin + factor // 2]
        high, low = part.max(-1), part.min(-1)
        one = torch.where(high.values >= -low.values, high.indices, low.indices + factor // 2)
        buckets += one * prod(factors[:number])
        begin += factor // 2
    return buckets.transpose(2, 3).short()


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return the centroid of the largest product, int16 ``[B, H, n]``.

    Args:
        vectors: ``[B, H, n, D]``.
        centroids: ``[G, C, D]`` float32, for ``H / G`` heads each.
    """
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    each = vectors.to(dtype).unflatten(1, (len(centroids), -1))
    return torch.einsum("rgspd,gcd->rgspc", each, centroids.to(dtype)).argmax(-1).flatten(1, 2).short()


def sorted_runs(buckets: Tensor, cut: Cut) -> Runs:
    """Return places of tokens by their buckets, int16 or int32 ``[B, H, rounds, n]``, and what is seen."""
    wide = buckets.long().clamp_max(cut.buckets)
    n = wide.shape[-1]
    token = torch.arange(n, device=wide.device).expand_as(wide)
    order = (wide * n + token).argsort(-1)
    ordered = wide.gather(-1, order)
    place, real = token, ordered < cut.buckets
    if cut.whole:
        base, total = torch.zeros_like(place), real.sum(-1, keepdim=True).expand_as(place)
    else:
        base = torch.searchsorted(ordered, ordered.contiguous())
        total = torch.searchsorted(ordered, ordered.contiguous(), right=True) - base
    rank = place - base
    own = rank // cut.chunk
    low = base + (own - cut.before).clamp_min(0) * cut.chunk
    high = base + torch.minimum((own + cut.after + 1) * cut.chunk, total) - 1
    first = base + (own - cut.after).clamp_min(0) * cut.chunk
    last = base + torch.minimum((own + cut.before + 1) * cut.chunk, total) - 1
    codes = own if cut.whole else ordered * cut.step + own
    if cut.causal:
        high, first = place, place
    alone = order < cut.lonely
    low, high = low.where(~alone, place), high.where(~alone, place - 1)
    codes = torch.empty_like(codes).scatter(-1, order, codes.where(real, NOWHERE))
    return Runs(*(each.int() for each in (order.where(real, -1), low, high, first, last, codes)))


def runs_of_last(
    of_queries: Tensor, of_keys: Tensor, buckets: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return places of queries and of keys by bucket, and which keys a query sees: the last ones before it of its own.

    Args:
        of_queries, of_keys: int16 or int32 ``[B, H, n]`` and ``[B, G, n]``; from ``buckets`` on they are padding.
        buckets: how many there are.
        width: the most keys that a query sees.

    Returns:
        The orders of queries ``[B, H, 1, n]`` and keys ``[B, G, 1, n]``, with -1 for padding; and ``low`` and ``high``
        of queries, as in ``Runs``. All int32.
    """
    orders, n = [], of_queries.shape[-1]
    for part in (of_queries, of_keys):
        wide = part.long().clamp_max(buckets)
        token = torch.arange(n, device=wide.device).expand_as(wide)
        key, order = (wide * n + token).sort(-1)
        orders.append((key, order.where(key < buckets * n, -1)))
    (asked, order_q), (held, order_k) = orders
    held = held.repeat_interleave(asked.shape[1] // held.shape[1], 1)
    end = torch.searchsorted(held, asked)
    low = torch.maximum(torch.searchsorted(held, asked // n * n), end - width)
    found = (order_q, order_k, low, end - 1)
    order_q, order_k, low, high = (each[:, :, None].int() for each in found)
    return order_q, order_k, low, high
