"""The specification: attention under a mask that lists of blocks describe, in PyTorch.

A pattern reaches the operator as a ``Layout``: square blocks of ``block`` queries by ``block`` keys, and of each of
them whether it is visible in whole, in part (a mask of bits), or not at all. Blocks are cut from *places*, and an order
may put any token at a place, so that a strided pattern has whole blocks, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

BLOCKS = (32, 64, 128)


@dataclass(eq=False)
class Layout:
    """A pattern. The operator reads these attributes of any object that has them; tensors are int32 and contiguous.

    Attributes:
        block: places of a block, 32, 64 or 128, of queries and of keys.
        heads: ``[H]``: which of the L head layouts a query head uses.
        starts: ``[L, query blocks + 1]``: where the list of a query block begins in ``columns``, and after the last
            where it ends.
        columns: ``[entries]``: the key block of each entry; a list names a block once.
        masks: ``[entries]``: an index into ``bits``, or -1 for a block that is visible in whole.
        bits: ``[U, block, block // 32]``: bit ``j`` of word ``w`` of row ``r`` says that the query at place ``r`` of
            the block sees the key at place ``32 w + j``.
        key_starts, rows, key_masks: the same lists by key block; ``rows`` has the query blocks, and the masks are
            those of ``masks``, not transposed.
        order_q: ``[L or 1, places]``: the token at each place, -1 for an empty one, which neither sees nor is seen.
            None puts token ``n`` at place ``n``, and places from N on are empty. A token has one place at most; one
            without a place sees nothing. The number of places is a multiple of ``block``.
        order_k: the same for keys.
    """

    block: int
    heads: Tensor
    starts: Tensor
    columns: Tensor
    masks: Tensor
    bits: Tensor
    key_starts: Tensor
    rows: Tensor
    key_masks: Tensor
    order_q: Tensor | None = None
    order_k: Tensor | None = None


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Any,
    scale: float,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    ramp: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the attention of ``query`` to the keys that it sees, and the logarithm of the sum of its exponentials.

    Scores and sums are float32, or float64 if the query is. Query head ``h`` reads key head ``h // (H // G)``.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]`` and ``[B, G, M, Dv]``, with H a multiple of G.
        layout: a ``Layout``, or an object with its attributes.
        scale: of the scores, above 0.
        segments_q, segments_k: int32 ``[B, N]`` and ``[B, M]``, both or none: a query sees a key only if their segments
            are equal and not negative (the documents of a packed row; -1 for padding).
        ramp: ``[H, 3]`` in the dtype of the scores: reach, slope and limit of each head. The exponential of a score
            counts ``min((reach - x) slope, 1)`` times, for a key that is x tokens from the query; not at all where that
            is not above 0, and from the limit on. None: once.

    Returns:
        out ``[B, H, N, Dv]`` in the dtype of the query, and lse ``[B, H, N]`` (natural logarithm), float32 or float64.
        A query that sees nothing has out 0 and lse ``-inf``.
    """
    seen = visible(layout, query.shape[2], key.shape[2], segments_q, segments_k)
    scores, _, values = _scores(query, key, value, seen, scale)
    if ramp is not None:
        scores = scores + _counts(ramp, query.shape[2], key.shape[2]).clamp(0, 1).log()
    lse = scores.logsumexp(-1)
    return (_weights(scores, lse) @ values).to(query.dtype), lse


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Any,
    scale: float,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    ramp: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return the gradients of ``query``, ``key`` and ``value``, in their dtypes, for the gradients of out and lse.

    With ``P = exp(S - lse)``: ``dV = P^T dO`` and ``dS = P (dO V^T - rowsum(dO O) + dlse)``. The fourth is that of
    ``ramp``: of the reach, ``sum(dS / (reach - x))`` over keys that count once or less; 0 of slope and limit.
    """
    seen = visible(layout, query.shape[2], key.shape[2], segments_q, segments_k)
    scores, keys, values = _scores(query, key, value, seen, scale)
    wide = scores.dtype
    counts = None if ramp is None else _counts(ramp, query.shape[2], key.shape[2])
    if counts is not None:
        scores = scores + counts.clamp(0, 1).log()
    weights, slope = _weights(scores, lse.to(wide)), grad_out.to(wide)
    delta = (slope * out.to(wide)).sum(-1)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide).masked_fill(lse == float("-inf"), 0.0)
    inner = weights * (slope @ values.mT - delta[..., None]) * scale
    grad_query = inner @ keys
    grad_key, grad_value = inner.mT @ query.to(wide), weights.mT @ slope
    shares = (key.shape[1], query.shape[1] // key.shape[1])
    grad_key, grad_value = (each.unflatten(1, shares).sum(2) for each in (grad_key, grad_value))
    grad_ramp = None
    if ramp is not None and counts is not None:
        within = (counts > 0) & (counts <= 1)
        of_count = (inner / scale).masked_fill(~within, 0) / counts.masked_fill(~within, 1)
        grad_ramp = torch.zeros_like(ramp)
        grad_ramp[:, 0] = of_count.sum((0, 2, 3)) * ramp[:, 1]
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), grad_ramp


def visible(
    layout: Any, N: int, M: int, segments_q: Tensor | None = None, segments_k: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Return which keys each query sees, by the lists of query blocks: bool ``[B or 1, H, N, M]``."""
    places = _expand(layout, layout.starts, layout.columns, layout.masks, by_key=False)
    heads = []
    for number, seen in enumerate(places):
        full = seen.new_zeros(N + 1, M + 1)
        q = _tokens(layout.order_q, number, seen.shape[0], N, seen.device)
        k = _tokens(layout.order_k, number, seen.shape[1], M, seen.device)
        full[q[:, None], k] = seen
        heads.append(full[:N, :M])
    found = torch.stack(heads)[layout.heads.long()][None]
    if segments_q is None or segments_k is None:
        return found
    same = (segments_q[:, :, None] == segments_k[:, None, :]) & (segments_q >= 0)[:, :, None]
    return found & same[:, None]


def visible_by_key(layout: Any) -> Tensor:
    """Return which places see which by the lists of key blocks: bool ``[L, places of queries, of keys]``."""
    return torch.stack(_expand(layout, layout.key_starts, layout.rows, layout.key_masks, by_key=True))


def _expand(layout: Any, starts: Tensor, others: Tensor, masks: Tensor, by_key: bool) -> list[Tensor]:
    """Return the mask over places of each head layout, by the lists of query blocks or of key blocks."""
    block = layout.block
    shifts = torch.arange(32, dtype=torch.int32, device=layout.bits.device)
    partial = ((layout.bits[..., None] >> shifts) & 1).flatten(2).bool()  # [U, block, block]
    sides = layout.starts.shape[1] - 1, layout.key_starts.shape[1] - 1
    blocks, numbers = others.tolist(), masks.tolist()
    found = []
    for bound in starts.tolist():
        seen = partial.new_zeros(sides[0], block, sides[1], block)
        for own in range(len(bound) - 1):
            for entry in range(bound[own], bound[own + 1]):
                row, column = (blocks[entry], own) if by_key else (own, blocks[entry])
                seen[row, :, column] = True if numbers[entry] < 0 else partial[numbers[entry]]
        found.append(seen.reshape(sides[0] * block, sides[1] * block))
    return found


def _tokens(order: Tensor | None, number: int, places: int, tokens: int, device: torch.device) -> Tensor:
    """Return the token at each place, ``tokens`` for empty places: int64."""
    if order is None:
        return torch.arange(places, device=device).clamp(max=tokens)
    own = order[min(number, order.shape[0] - 1)].long()
    return own.where(own >= 0, tokens)


def _scores(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores, ``-inf`` where nothing is seen, and the keys and values of each query head."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    group = query.shape[1] // key.shape[1]
    keys, values = (each.to(wide).repeat_interleave(group, 1) for each in (key, value))
    scores = (query.to(wide) @ keys.mT) * scale
    return scores.masked_fill(~seen, float("-inf")), keys, values


def _counts(ramp: Tensor, N: int, M: int) -> Tensor:
    """Return how many times pairs count, before that is cut to 0 and 1: ``[H, N, M]``."""
    away = (torch.arange(N, device=ramp.device)[:, None] - torch.arange(M, device=ramp.device)).abs().to(ramp.dtype)
    reach, slope, limit = (each[:, None, None] for each in ramp.unbind(1))
    return torch.where(away < limit, (reach - away) * slope, 0)


def _weights(scores: Tensor, lse: Tensor) -> Tensor:
    """Return the softmax; zeros for rows that see nothing."""
    return torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
