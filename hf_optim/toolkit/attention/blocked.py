"""Attention over lists of blocks in plain PyTorch: blocks of keys are gathered, so time and memory follow the lists.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from .layout import Layout

SCORES_AT_ONCE = 2**25  # scores that are formed at a time

# ``bias(distance, heads)``: what is added to scaled scores of pairs with these distances (query minus key, int64, any
# shape) in chosen heads (int64 ``[H']``, None for all): ``[H', *distance.shape]``, -inf where a head sees nothing.
DistanceBias = Callable[[Tensor, Tensor | None], Tensor]


def blocked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: Layout,
    scale: float,
    segments_q: Tensor | None = None,
    segments_k: Tensor | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of one pass; differentiable, also by the log-sum-exp.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]``, G divides H.
        layout: the lists, on the device of the query.
        scale: of the scores.
        segments_q, segments_k: int ``[B, N]`` and ``[B, M]``: a query sees a key if both are equal and not negative.
        dropout: share of the weights that is dropped.
        bias: what is added to scores by their distance, counted in places of the row.

    Returns:
        The output ``[B, H, N, D]`` in the dtype of the query, zero for a query without keys, and the log-sum-exp of the
        scores ``[B, H, N]`` (natural logarithm, at least float32), ``-inf`` there.
    """
    heads = layout.heads.tolist()
    if len(layout.starts) == 1:
        return _one_pattern(query, key, value, layout, 0, scale, segments_q, segments_k, dropout, bias)
    group = query.shape[1] // key.shape[1]
    outputs: list[Tensor] = [query] * len(heads)
    sums: list[Tensor] = [query] * len(heads)
    for pattern in sorted(set(heads)):
        chosen = [head for head, own in enumerate(heads) if own == pattern]
        index = torch.tensor(chosen, device=query.device)
        q, k, v = query[:, index], key[:, index // group], value[:, index // group]
        own = None if bias is None else _of_heads(bias, index)
        out, lse = _one_pattern(q, k, v, layout, pattern, scale, segments_q, segments_k, dropout, own)
        for place, head in enumerate(chosen):
            outputs[head], sums[head] = out[:, place], lse[:, place]
    return torch.stack(outputs, 1), torch.stack(sums, 1)


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the attention over the union of disjoint sets of keys from output and log-sum-exp over each."""
    if len(parts) == 1:
        return parts[0][0]
    if len(parts) == 2:
        # One pass over the outputs. The first sum is finite in a difference, so that no gradient is of infinities.
        (one, own), (two, other) = parts
        share = torch.sigmoid(other - own.clamp_min(torch.finfo(own.dtype).min))
        return torch.lerp(one, two, share[..., None].to(one.dtype))
    sums = torch.stack([lse for _, lse in parts])
    total = torch.logsumexp(sums, 0)
    weights = torch.exp(sums - torch.where(torch.isneginf(total), 0, total))[..., None]
    out = parts[0][0] * weights[0].to(parts[0][0].dtype)
    for (part, _), weight in zip(parts[1:], weights[1:], strict=True):
        out = torch.addcmul(out, part, weight.to(part.dtype))
    return out


def _of_heads(bias: DistanceBias, index: Tensor) -> DistanceBias:
    return lambda distance, heads: bias(distance, index if heads is None else index[heads])


def _one_pattern(
    query: Tensor, key: Tensor, value: Tensor, layout: Layout, pattern: int, scale: float,
    segments_q: Tensor | None, segments_k: Tensor | None, dropout: float, bias: DistanceBias | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    block, group = layout.block, query.shape[1] // key.shape[1]
    places_q = _places(layout.order_q, pattern, query.shape[2], layout.starts.shape[1] - 1, block, query.device)
    places_k = _places(layout.order_k, pattern, key.shape[2], layout.key_starts.shape[1] - 1, block, query.device)
    starts = layout.starts[pattern].long()
    counts = starts.diff()
    masks = layout.unpacked()
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    out = query.new_zeros(*query.shape[:3], value.shape[-1])
    sums = torch.full(query.shape[:3], -torch.inf, dtype=accurate, device=query.device)
    tokens_at: list[Tensor] = []
    outs: list[Tensor] = []
    lses: list[Tensor] = []
    for count in counts.unique().tolist():
        if count == 0:
            continue
        rows = (counts == count).nonzero()[:, 0]
        scores = query.shape[0] * query.shape[1] * block * block * count
        for some in rows.split(max(1, SCORES_AT_ONCE // scores)):
            entries = starts[some][:, None] + torch.arange(count, device=query.device)
            tokens_q = places_q[some]  # [R, block]
            tokens_k = places_k[layout.columns[entries].long()].flatten(1)  # [R, count * block]
            seen = masks[layout.masks[entries].long()].transpose(1, 2).flatten(2)  # [R, block, count * block]
            seen = seen & (tokens_q >= 0)[:, :, None] & (tokens_k >= 0)[:, None, :]
            q, k, v = (_gathered(part, at) for part, at in ((query, tokens_q), (key, tokens_k), (value, tokens_k)))
            visible = seen[None]
            if segments_q is not None and segments_k is not None:
                own = segments_q[:, tokens_q.clamp_min(0)]
                visible = visible & (own[..., None] == segments_k[:, tokens_k.clamp_min(0)][:, :, None])
                visible = visible & (own >= 0)[..., None]
            # [B, G, H / G, R, block, D] against [B, G, 1, R, keys, D]
            q = q.unflatten(1, (-1, group))
            form = (q.to(accurate) * scale) @ k.to(accurate).transpose(-1, -2)[:, :, None]
            if bias is not None:
                added = bias(tokens_q[:, :, None] - tokens_k[:, None, :], None)
                form = form + added.to(accurate).unflatten(0, (-1, group))
            form = form.masked_fill(~visible[:, None, None], -torch.inf)
            lse = torch.logsumexp(form, -1)
            weights = torch.exp(form - lse.masked_fill(torch.isneginf(lse), 0)[..., None])
            if dropout:
                weights = functional.dropout(weights, dropout)
            found = weights.to(value.dtype) @ v[:, :, None]
            real = tokens_q.flatten() >= 0
            tokens_at.append(tokens_q.flatten()[real])
            outs.append(found.flatten(1, 2).flatten(2, 3)[:, :, real])
            lses.append(lse.flatten(1, 2).flatten(2, 3)[:, :, real])
    if not tokens_at:
        return out, sums
    at = torch.cat(tokens_at)
    return out.index_copy(2, at, torch.cat(outs, 2)), sums.index_copy(2, at, torch.cat(lses, 2))


def _places(order: Tensor | None, pattern: int, tokens: int, blocks: int, block: int, device: torch.device) -> Tensor:
    """Return the token at each place, ``[blocks, block]``; -1 for none."""
    if order is not None:
        return order[pattern].long().view(blocks, block)
    places = torch.arange(blocks * block, device=device)
    return torch.where(places < tokens, places, -1).view(blocks, block)


def _gathered(part: Tensor, tokens: Tensor) -> Tensor:
    """Return the rows of ``[B, G, N, D]`` at ``[R, n]`` as ``[B, G, R, n, D]``."""
    return part.index_select(2, tokens.clamp_min(0).flatten()).unflatten(2, tokens.shape)
