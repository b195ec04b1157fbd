"""Attention over the tokens that random rotations hash alike, with keys that are the queries at unit length.

    k_j = q_j / |q_j|,     o_i = sum_j softmax_j(q_i . k_j + log N_ij) v_j,     q_i . k_i := -1e5

``N_ij`` says whether a round of hashing finds key j for query i, or how often (Kitaev et al., arXiv 2001.04451,
section 2 and appendix A). Each round sorts tokens, and the products are those of chunks with their neighbours: no
matrix of all pairs is formed.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .lsh_cuts import LshCut, beside, sorted_rounds
from .lsh_flash import HIDDEN, SELF, flash_rounds, has_flash
from .lsh_kernel import bucket_kernel, kernel_chunks, order_by_kernel, rounds_by_kernel
from .lsh_places import (
    BUCKET,
    NOWHERE,
    LshScheme,
    chunks_of_rows,
    codes_in_order,
    sorted_tokens,
    times_seen,
    with_padding,
)

EPSILON = 1e-6  # of the mean square of a query
QUERIES = 64  # that are computed at a time behind a cache


def unit_keys(query: Tensor) -> Tensor:
    """Return queries ``[..., D]`` at unit length: ``q / sqrt(mean(q^2) + 1e-6) / sqrt(D)``, as the authors' code."""
    wide = query if query.dtype == torch.float64 else query.float()
    scale = (wide.square().mean(-1, keepdim=True) + EPSILON).rsqrt() * query.shape[-1] ** -0.5
    return (wide * scale).to(query.dtype)


def full_shared_attention(
    query: Tensor, value: Tensor, lengths: Tensor | None, causal: bool, dropout: float = 0.0
) -> Tensor:
    """Compute the attention over all pairs, with shared queries and keys; arguments as in ``lsh_attention``."""
    count = query.shape[2]
    seen = torch.ones(1, count, count, dtype=torch.bool, device=query.device)
    if causal:
        seen = seen.tril()
    if lengths is not None:
        seen = seen & (torch.arange(count, device=query.device) < lengths[:, None])[:, None]
    own = torch.eye(count, dtype=torch.bool, device=query.device)
    seen = seen & ~own
    seen = (seen | (own & ~seen.any(-1, keepdim=True)))[:, None]
    shared = value.shape[1] != query.shape[1]
    return functional.scaled_dot_product_attention(
        query, unit_keys(query), value, seen, dropout, scale=1.0, enable_gqa=shared
    )


def lsh_attention(
    query: Tensor,
    value: Tensor,
    buckets: Tensor,
    scheme: LshScheme,
    causal: bool,
    lengths: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the attention of rows without earlier tokens.

    Args:
        query: ``[R, H, n, D]``; keys are made of them.
        value: ``[R, G, n, E]``, G a divisor of H.
        buckets: int16 or int64 ``[R, H, rounds, n]`` of ``hash_vectors``.
        scheme: says which pairs are computed.
        causal: a token sees no later ones.
        lengths: int64 ``[R]``: tokens of each row, padding behind them; None: all n.
        dropout: share of the weights that is dropped.

    Returns:
        ``[R, H, n, E]``; that of padding means nothing.
    """
    count = query.shape[2]
    if count <= scheme.chunk:
        return full_shared_attention(query, value, lengths, causal, dropout)
    buckets = with_padding(buckets, lengths, scheme, causal)
    if scheme.counts_once:
        made = rounds_by_kernel(query, value, buckets, scheme, causal, lengths is not None, dropout)
        if made is not None:
            return made
    buckets = buckets.long()
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    if scheme.counts_once:
        out = _round_by_round(query, value, buckets, scheme, causal, dropout)
    else:
        every = torch.full((len(query),), count, device=query.device) if lengths is None else lengths
        out = _rounds_in_a_ring(query, value, buckets, scheme, causal, every, lengths is None, dropout)
    if scheme.scheme == BUCKET and causal:
        first = query[:, :, : scheme.chunk], value[:, :, : scheme.chunk]
        near = full_shared_attention(*first, None, True, dropout)
        out = torch.cat([near, out[:, :, scheme.chunk :]], 2)
    return out


def _round_by_round(
    query: Tensor, value: Tensor, buckets: Tensor, scheme: LshScheme, causal: bool, dropout: float
) -> Tensor:
    """Compute schemes in which a key counts once: in the first of the rounds that find it."""
    if not dropout and has_flash(query, value):
        return flash_rounds(query, unit_keys(query), value, buckets, scheme, causal)
    outs, sums, sides = [], [], scheme.beside(causal)
    for cut, seen, own in sorted_rounds(buckets, scheme, causal):
        q, v = cut.take(query), cut.take(value)
        out, total = _product(q, beside(unit_keys(q), sides), beside(v, sides), seen, own, dropout)
        outs.append(cut.put(out))
        sums.append(cut.put(total[..., None]))
    return _combined(outs, sums)


def _rounds_in_a_ring(
    query: Tensor, value: Tensor, buckets: Tensor, scheme: LshScheme, causal: bool, lengths: Tensor,
    whole: bool, dropout: float,
) -> Tensor:  # fmt: skip
    """Compute the authors' scheme: the chunks of all rounds, one behind the other, form a ring.

    ``whole`` says that all rows have as many tokens as there are places, so that their rings are alike.
    """
    kernel = bucket_kernel(query, value, scheme, dropout) if whole else None
    orders = None if kernel is None else order_by_kernel(buckets, scheme)
    cuts, parts, keys = [], [], unit_keys(query)
    for r in range(scheme.rounds):
        order = sorted_tokens(buckets[:, :, r]) if orders is None else orders[:, :, r]
        cut = LshCut(order, scheme.chunk)
        if not whole:
            code = codes_in_order(buckets[:, :, r].gather(-1, order), scheme)
            order = order.masked_fill(code == NOWHERE, -1)
        cuts.append(cut)
        parts.append((cut.take(query), cut.take(keys), cut.take(value), cut.split(order, -1)))
    q, k, v, at = (torch.cat(each, 2) for each in zip(*parts, strict=True))
    if kernel is not None:
        return _put(cuts, *kernel_chunks(kernel, q, k, v, at, scheme, causal))
    ring = _neighbours(chunks_of_rows(lengths, scheme), scheme, q.shape[2])
    keys, values, places = (_ring_of(part, ring) for part in (k, v, at))
    own = at[..., :, None] == places[..., None, :]
    seen = (places >= 0)[..., None, :].expand_as(own)
    if causal:
        seen = seen & (places[..., None, :] <= at[..., :, None])
    out, total = _product(q, keys, values, seen, own & seen, dropout)
    return _put(cuts, out, total)


def _put(cuts: list[LshCut], out: Tensor, total: Tensor) -> Tensor:
    """Return the chunks of all rounds in the order of the tokens, and the rounds in one."""
    outs = [cut.put(part) for cut, part in zip(cuts, out.chunk(len(cuts), 2), strict=True)]
    sums = [cut.put(part) for cut, part in zip(cuts, total[..., None].chunk(len(cuts), 2), strict=True)]
    return _combined(outs, sums)


def _product(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, own: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of chunks ``[R, H, C, m, E]`` and its log-sum-exp ``[R, H, C, m]``.

    Args:
        query: ``[R, H, C, m, D]``.
        key, value: ``[R, H, C, W, D or E]``.
        seen, own: bool ``[R, H, C, m, W]``: pairs that are seen, and those of a token with itself; None: not seen.
        dropout: share of the weights that is dropped.
    """
    scores = query @ key.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    if own is None:
        scores = scores.masked_fill(~seen, HIDDEN)
    else:
        scores = torch.where(seen & ~own, scores, torch.where(own & seen, SELF, HIDDEN).to(scores.dtype))
    weights = scores.softmax(-1)
    most, place = scores.max(-1, keepdim=True)
    total = (most - weights.gather(-1, place).log())[..., 0]  # the log-sum-exp, without exponentials of its own
    if dropout:
        weights = functional.dropout(weights, dropout)
    return weights.to(value.dtype) @ value, total


def _combined(outs: list[Tensor], sums: list[Tensor]) -> Tensor:
    """Return the rounds in one, each with the share that its sum of exponentials has."""
    if len(outs) == 1:
        return outs[0]
    share = torch.stack(sums).softmax(0).to(outs[0].dtype)
    return (torch.stack(outs) * share).sum(0)


def _neighbours(chunks: Tensor, scheme: LshScheme, count: int) -> Tensor:
    """Return the chunks that each chunk of a ring sees, int64 ``[R, count, before + 1 + after]``.

    Args:
        chunks: int64 ``[R]``: filled chunks of each row in a round.
        scheme: says how many on either side.
        count: chunks of all rounds, empty ones of shorter rows among them.
    """
    own = torch.arange(count, device=chunks.device)
    each = count // scheme.rounds
    filled = (own // each) * chunks[:, None] + own % each
    apart = torch.arange(-scheme.before, scheme.after + 1, device=chunks.device)
    chunks = chunks[:, None, None]
    place = (filled[..., None] + apart) % (scheme.rounds * chunks)
    return place // chunks * each + place % chunks


def _ring_of(part: Tensor, ring: Tensor) -> Tensor:
    """Return ``[R, H, C, m, ...]`` with the neighbours of each chunk, ``[R, H, C, W, ...]``."""
    rows = torch.arange(len(part), device=part.device)[:, None, None]
    found = part.transpose(1, 2)[rows, ring]
    return found.permute(0, 3, 1, 2, *range(4, found.dim())).flatten(3, 4)


def attention_behind(
    query: Tensor,
    at: Tensor,
    keys: Tensor,
    values: Tensor,
    codes: Tensor,
    places: Tensor,
    lengths: Tensor,
    scheme: LshScheme,
    dropout: float = 0.0,
) -> Tensor:
    """Compute the causal attention of the last tokens of rows over all tokens so far, which a cache holds.

    One query reads the keys that it sees and no others. Several are computed ``QUERIES`` at a time over all keys.

    Args:
        query: ``[R, H, N, D]``: of the last N of the M tokens.
        at: int64 ``[R, N]``: their places in their rows.
        keys: of ``unit_keys``, ``[R, H, M, D]``.
        values: ``[R, G, M, E]``.
        codes: int32 ``[R, H, rounds, M]``.
        places: int ``[R, M]`` of the tokens in their rows; -1 for padding.
        lengths: int64 ``[R]``: tokens of each row.
        scheme: says which pairs are computed.
        dropout: share of the weights that is dropped.

    Returns:
        ``[R, H, N, E]``; that of padding means nothing.
    """
    outs, first = [], codes.shape[-1] - query.shape[2]
    key_at = places[:, None, None]
    for begin in range(0, query.shape[2], QUERIES):
        part = slice(begin, min(begin + QUERIES, query.shape[2]))
        own = codes[..., first + part.start : first + part.stop]
        times = times_seen(own, codes, lengths, scheme)
        query_at = at[:, None, part, None]
        if scheme.scheme == BUCKET:
            times = torch.where(query_at < scheme.chunk, 1, times)
        times = times.masked_fill((key_at > query_at) | (key_at < 0), 0)
        bias = times.to(torch.float64 if query.dtype == torch.float64 else torch.float32).log()
        bias = bias.masked_fill(times == 0, HIDDEN).masked_fill((key_at == query_at) & (times > 0), SELF)
        outs.append(_over_the_seen(query[:, :, part], keys, values, bias, scheme, dropout))
    return torch.cat(outs, 2)


def _over_the_seen(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scheme: LshScheme, dropout: float
) -> Tensor:
    """Return the attention under ``bias``, ``[R, H, N, M]``; one query gathers the keys that it can see."""
    count = keys.shape[2]
    most = max(scheme.most_seen, scheme.chunk)
    if query.shape[2] == 1 and 2 * most < count:
        index = bias[:, :, 0].topk(most, sorted=False).indices
        bias = bias.gather(-1, index[:, :, None])
        group = query.shape[1] // values.shape[1]
        rows = torch.arange(len(keys), device=keys.device)[:, None, None]
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]
        keys, values = keys[rows, head, index], values[rows, head // group, index]
    else:
        values = values.repeat_interleave(query.shape[1] // values.shape[1], 1)
    scores = query @ keys.transpose(-1, -2)
    scores = scores if scores.dtype == torch.float64 else scores.float()
    scores = torch.where(bias == SELF, bias, scores + bias)
    weights = scores.softmax(-1)
    if dropout:
        weights = functional.dropout(weights, dropout)
    return weights.to(values.dtype) @ values
