"""Attention over compressed windows and raw tokens.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_optim.toolkit.attention import HeadPatterns, Pattern, Source, attend_lists, dense_product, lists_for

from ._compressed_terms import RawTokens, SeenWindows, is_near
from ._key_compression import Held

QUERIES = 256  # that are computed at a time


def compressed_attention(
    query: Tensor,
    held: Held,
    positions: Tensor,
    causal: bool,
    scale: float,
    dropout: float = 0.0,
    start: int | None = None,
) -> Tensor:
    """Compute the softmax attention of queries over what each of them sees, in one softmax.

    A query sees ``n / stride`` windows, in a causal model half as many on average, and ``local + stride`` tokens.
    Long rows without padding or cache are computed by lists of blocks; else queries are computed some at a time, each
    group with the keys that it can see.

    Args:
        query: ``[B, H, N, D]``.
        held: all tokens of the rows, with the tokens of the queries and their windows compressed.
        positions: int64 ``[1 or B, N]`` of the queries in their rows.
        causal: keys behind a query are not seen.
        scale: of the scores.
        dropout: share of the weights that is dropped.
        start: position of the first query, if those of all rows follow each other; None: the host reads ``positions``.

    Returns:
        ``[B, H, N, D]``; zero for a query that sees nothing.
    """
    count, length = query.shape[2], max(held.tokens)
    whole = held.even and count == length and not any(held.first)
    if whole and held.local >= length:
        return _product(query, held.raw_key, held.raw_value, None, causal, scale, dropout)
    if whole and held.stride == 1 and held.local == 0:
        return _product(query, held.key, held.value, None, causal, scale, dropout)
    if whole and start == 0 and (sources := _sources(query, held, causal)):
        return attend_lists(query, sources, scale, None, dropout)
    groups = positions.split(QUERIES, dim=1)
    bounds = _bounds(held, groups, causal) if start is None else _plain_bounds(held, start, count, causal)
    out = [
        (_causal if causal else _two_sided)(part, held, at, bound, scale, dropout)
        for part, at, bound in zip(query.split(QUERIES, 2), groups, bounds, strict=True)
    ]
    return torch.cat(out, 2)


def _sources(query: Tensor, held: Held, causal: bool) -> list[Source]:
    """Return windows and raw tokens with their lists of blocks, for whole rows; none for rows that are too short."""
    length, found = query.shape[2], []
    terms = (SeenWindows, held.key, held.value), (RawTokens, held.raw_key, held.raw_value)
    for kind, key, value in terms:
        pattern = Pattern((kind(held.stride, held.local, causal),))
        if not key.shape[2] or (kind is RawTokens and not (held.local or causal or length % held.stride)):
            continue
        lists = lists_for(query, HeadPatterns.of([pattern], query.shape[1]), length, "auto")
        if lists is None:
            return []
        found.append(Source(key, value, lists, None))
    return found


def _bounds(held: Held, groups: tuple[Tensor, ...], causal: bool) -> list[tuple[int, int, int]]:
    """Return for each group how many windows it may see, and the slots of raw tokens: from and up to which."""
    first = torch.tensor(held.first, device=groups[0].device)[:, None]
    stride, local = held.stride, held.local
    found = []
    for at in groups:
        if causal:
            windows = compressed_for(at, stride, local)
            low, high = windows * stride - first, at + 1 - first
        elif local:
            windows = at.new_full((1, 1), held.key.shape[2])
            low, high = (at + 1 - local).clamp_min(0) // stride * stride, ((at + local - 1) // stride + 1) * stride
        else:
            windows, low = at.new_full((1, 1), held.key.shape[2]), at.new_zeros(1, 1)
            high = low
        found.append(torch.stack([windows.max(), low.min().clamp_min(0), high.max()]))
    return [(a, b, max(b, min(c, held.raw_key.shape[2]))) for a, b, c in torch.stack(found).tolist()]


def _plain_bounds(held: Held, start: int, count: int, causal: bool) -> list[tuple[int, int, int]]:
    """Return ``_bounds`` of queries at the positions from ``start`` on. The host asks the device for nothing."""
    stride, local, found = held.stride, held.local, []
    for one in range(start, start + count, QUERIES):
        last = min(one + QUERIES, start + count) - 1
        windows = held.key.shape[2]
        if causal:
            windows, least = (max(0, at + 1 - local) // stride for at in (last, one))
            low, high = least * stride - max(held.first), last + 1 - min(held.first)
        elif local:
            low, high = max(0, one + 1 - local) // stride * stride, ((last + local - 1) // stride + 1) * stride
        else:
            low = high = 0
        low = max(0, low)
        found.append((windows, low, max(low, min(high, held.raw_key.shape[2]))))
    return found


def _by_row(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Return a number for each row ``[B]``, or one for all ``[1]``, for which nothing is copied from the host."""
    if len(set(numbers)) == 1:
        return torch.full((1,), numbers[0], device=device)
    return torch.tensor(numbers, device=device)


def compressed_for(positions: Tensor, stride: int, local: int) -> Tensor:
    """Return how many windows are compressed for causal queries at ``positions``."""
    return (positions + 1 - local).clamp_min(0) // stride


def _causal(query: Tensor, held: Held, at: Tensor, bound: tuple[int, int, int], scale: float, dropout: float) -> Tensor:
    windows, low, high = bound
    own = compressed_for(at, held.stride, held.local)[..., None]
    place = torch.arange(low, high, device=at.device) + _by_row(held.first, at.device)[:, None, None]
    in_window = torch.arange(windows, device=at.device) < own
    raw = (place <= at[..., None]) & (place >= own * held.stride)
    seen = torch.cat([in_window.expand(len(raw), -1, -1), raw], 2)
    key = torch.cat([held.key[:, :, :windows], held.raw_key[:, :, low:high]], 2)
    value = torch.cat([held.value[:, :, :windows], held.raw_value[:, :, low:high]], 2)
    return _product(query, key, value, seen, False, scale, dropout)


def _two_sided(
    query: Tensor, held: Held, at: Tensor, bound: tuple[int, int, int], scale: float, dropout: float
) -> Tensor:
    _, low, high = bound
    stride, local, device = held.stride, held.local, at.device
    complete = _by_row(held.windows, device)[:, None]
    window = torch.arange(held.key.shape[2], device=device)
    tail = complete * stride + torch.arange(stride - 1, device=device)
    in_row = tail < _by_row(held.tokens, device)[:, None]
    slots = tail.clamp_max(held.raw_key.shape[2] - 1)[:, None, :, None]
    tails = [
        part.gather(2, slots.expand(len(part), part.shape[1], -1, part.shape[3]))
        for part in (held.raw_key, held.raw_value)
    ]
    if held.even:
        real = max(held.tokens) - held.windows[0] * stride
        tails, in_row = [part[:, :, :real] for part in tails], in_row[:, :real]
    key, value = torch.cat([held.key, tails[0]], 2), torch.cat([held.value, tails[1]], 2)
    if held.even and not local:
        return _product(query, key, value, None, False, scale, dropout)
    exists = torch.cat([window < complete, in_row], 1)[:, None]
    if not local:
        return _product(query, key, value, exists.expand(-1, at.shape[1], -1), False, scale, dropout)
    place = torch.arange(low, high, device=device)
    near = is_near(at[..., None], window, stride, local)
    raw = is_near(at[..., None], place // stride, stride, local) & (place < complete * stride)[:, None]
    always = torch.ones(len(near), near.shape[1], in_row.shape[1], dtype=torch.bool, device=device)
    seen = torch.cat([(torch.cat([~near, always], 2) & exists), raw], 2)
    key = torch.cat([key, held.raw_key[:, :, low:high]], 2)
    value = torch.cat([value, held.raw_value[:, :, low:high]], 2)
    return _product(query, key, value, seen, False, scale, dropout)


def _product(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, causal: bool, scale: float, dropout: float
) -> Tensor:
    """Return attention under ``seen``, bool ``[1 or B, N, M]``, zero for queries that see nothing."""
    if seen is None:
        return dense_product(query, key, value, None, dropout, causal and query.shape[2] > 1, scale)
    empty = ~seen.any(-1, keepdim=True)
    mask = (seen | empty)[:, None]  # no row without keys: its softmax would be undefined
    out = dense_product(query, key, value, mask, dropout, scale=scale)
    return out.masked_fill(empty[:, None], 0)
