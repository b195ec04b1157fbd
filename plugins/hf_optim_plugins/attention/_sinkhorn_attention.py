"""Attention to the own block and to a block that was sorted there.

Rows are cut into N blocks of L tokens from their first token; G heads of keys are sorted each by itself.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from ._query_blocks import weights_of

LEAST_SHARE = 1e-10  # of tokens in a sorted place, below which it is padding


def in_row(part: Tensor, size: int) -> Tensor:
    """Return ``[R, H, P, D]`` in blocks ``[R, H, N, L, D]``, with zeros behind the last token."""
    if part.shape[2] % size:  # padding by nothing copies
        part = functional.pad(part, (0, 0, 0, -part.shape[2] % size))
    return part.unflatten(2, (-1, size))


def sorted_blocks(weights: Tensor, part: Tensor) -> Tensor:
    """Return what of the blocks ``[R, G, M, L, D]`` the rows of ``weights`` ``[R, G, N, M]`` put in each place."""
    return torch.einsum("rgnm,rgmld->rgnld", weights.to(part), part)


def own_and_sorted(weights: Tensor, part: Tensor) -> Tensor:
    """Return the blocks ``[R, G, N, L, D]``, behind the tokens of each those of ``sorted_blocks``: ``[.., 2 L, D]``."""
    if torch.is_grad_enabled() and (weights.requires_grad or part.requires_grad):
        return torch.cat([part, sorted_blocks(weights, part)], 3)
    size = part.shape[3]
    joined = part.new_empty(*part.shape[:3], 2 * size, part.shape[4])
    joined[:, :, :, :size] = part
    sorted_there = joined.flatten(0, 1)[:, :, size:].flatten(2)  # a view: the product is written where it is read
    torch.bmm(weights.to(part).flatten(0, 1), part.flatten(3).flatten(0, 1), out=sorted_there)
    return joined


def sorted_with_padding(weights: Tensor, parts: tuple[Tensor, Tensor], valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return sorted keys and values, and the logarithm of the share of tokens in each sorted place ``[R, G, N, L]``.

    Padding takes no part: of a place that gets padding from some blocks, the others' weights are scaled up, and its
    keys count with the share that was theirs. ``valid``: bool ``[R, M, L]``.
    """
    wide = valid[:, None].to(weights)
    share = torch.einsum("rgnm,rgml->rgnl", weights, wide.expand(-1, weights.shape[1], -1, -1))
    share = share / weights.sum(-1)[..., None].clamp_min(1e-30)
    scale = share.clamp_min(LEAST_SHARE)
    made = []
    for part in parts:  # in the dtype of the weights: in float16 small shares are zero
        there = part.to(weights) * valid[:, None, :, :, None]
        made.append((sorted_blocks(weights, there) / scale[..., None]).to(part))
    return made[0], made[1], scale.log().masked_fill(share < LEAST_SHARE, -torch.inf)


def block_attention(
    query: Tensor,
    own: tuple[Tensor, Tensor],
    brought: tuple[Tensor, Tensor] | None,
    seen: Tensor | None,
    bias: Tensor | None,
    scale: float,
    dropout: float,
) -> Tensor:
    """Compute one softmax over the keys of the own block and those that were sorted there.

    Args:
        query: ``[R, H, N, L, D]``.
        own: keys and values ``[R, G, N, L, D]``.
        brought: sorted ones; None if there are none.
        seen: bool, broadcasts to ``[R, G, H / G, N, L, 2 L]``; None: all.
        bias: added to the scores of sorted keys, broadcasts to ``[R, G, 1, N, 1, L]``; None for zero.
        scale: of the scores.
        dropout: share of the weights that is dropped.

    Returns:
        ``[R, H, N, L, D]``.
    """
    key, value = own if brought is None else (torch.cat(pair, 3) for pair in zip(own, brought, strict=True))
    asked = (query * scale).unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("rgsnqd,rgnkd->rgsnqk", asked, key)
    if bias is not None:
        shift = functional.pad(bias, (scores.shape[-1] - bias.shape[-1], 0))
        scores = scores + shift.clamp_min(-1e4).to(scores)
        hidden = (shift > -torch.inf).expand(*shift.shape)
        seen = hidden if seen is None else seen & hidden
    out = torch.einsum("rgsnqk,rgnkd->rgsnqd", weights_of(scores, seen, dropout), value)
    return out.flatten(1, 2)


def shared_mean(part: Tensor, groups: int) -> Tensor:
    """Return the mean of the query heads that share a key head, ``[R, G, ...]`` of ``[R, H, ...]``."""
    return part.unflatten(1, (groups, -1)).mean(2)


def summaries(blocks: Tensor, kind: str, valid: Tensor | None) -> Tensor:
    """Return the ``sum`` or the ``mean`` of the tokens of blocks ``[R, G, N, L, D]``, in float32 or wider.

    ``valid``: bool ``[R, N, L]``; padding does not count. None: all tokens do.
    """
    dtype = torch.promote_types(blocks.dtype, torch.float32)
    if valid is None:
        return blocks.sum(3, dtype=dtype) if kind == "sum" else blocks.mean(3, dtype=dtype)
    wide = blocks.to(dtype)
    total = (wide * valid[:, None, :, :, None]).sum(3)
    return total if kind == "sum" else total / valid.sum(2).clamp_min(1)[:, None, :, None]
