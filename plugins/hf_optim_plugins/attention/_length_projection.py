"""Keys and values projected along the length of a row, and attention over what is left.

    K' = E K,   V' = F V,   A = softmax(Q K'^T * scale) V',      E, F in R^(k x n)

A row of ``L < n`` tokens has the first L columns of E and F. Padding is zero before it is projected.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hf_optim.toolkit.attention import dense_product

SHARING = ("none", "headwise", "key_value", "layerwise")
STARTS = ("pooling", "interleaved", "random")
SHORT = ("weighted", "zero")


def pooling(slots: int, length: int) -> Tensor:
    """Return ``[slots, length]`` whose slots are the means of successive, nearly equal parts of a row.

    With as many slots as tokens it is the identity.
    """
    bounds = torch.arange(slots + 1) * length // slots
    at = torch.arange(length)
    inside = (at >= bounds[:-1, None]) & (at < bounds[1:, None])
    return inside / inside.sum(1, keepdim=True)


def interleaved(slots: int, length: int) -> Tensor:
    """Return ``[slots, length]`` whose slots are the means of every ``slots``-th token.

    The first ``slots`` tokens of a row are in different slots; with as many slots as tokens it is the identity.
    """
    inside = torch.arange(length) % slots == torch.arange(slots)[:, None]
    return inside / inside.sum(1, keepdim=True)


class LengthProjection(nn.Module):
    """E and F of one attention.

    Args:
        heads: of the keys.
        slots: k, keys and values that are left.
        length: n, the most tokens of a row.
        sharing: ``none``, each head of keys and of values has its own; ``headwise``, E for all heads and F for all;
            ``key_value`` and ``layerwise``, E for both, so that F is None.
        start: ``pooling`` or ``interleaved``, the functions above, or ``random``, normal with variance 1 / k.
    """

    def __init__(self, heads: int, slots: int, length: int, sharing: str, start: str, **about: Any) -> None:
        super().__init__()
        self.start = start
        count = heads if sharing == "none" else 1
        self.key = nn.Parameter(torch.empty(count, slots, length, **about))
        self.value = None
        if sharing in ("none", "headwise"):
            self.value = nn.Parameter(torch.empty(count, slots, length, **about))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameters, or make them means."""
        for weight in (self.key, self.value):
            if weight is not None and not weight.is_meta:
                with torch.no_grad():
                    if self.start == "random":
                        weight.normal_(0, weight.shape[1] ** -0.5)
                    else:
                        means = pooling if self.start == "pooling" else interleaved
                        weight.copy_(means(*weight.shape[1:]).to(weight.device))

    @property
    def length(self) -> int:
        """n, the most tokens of a row."""
        return self.key.shape[2]


def projected_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    projection: LengthProjection,
    valid: Tensor | None,
    scale: float,
    short: str = "weighted",
    dropout: float = 0.0,
) -> Tensor:
    """Compute the softmax attention of queries over projected keys and values.

    Args:
        query: ``[B, H, P, D]``.
        key, value: ``[B, G, P, D]`` of tokens from place 0 of their rows.
        projection: of at least P tokens.
        valid: bool ``[B, P]``, False for padding; None if there is none.
        scale: of the scores.
        short: what rows of fewer than n tokens, padding left out, compute. ``zero``: the formula above with the columns
            of their tokens, in which a slot that no token reaches has a key and a value of zero, and still takes its
            share of the softmax. ``weighted``: with e_i and f_i, the shares of the absolute weights of row i of E and F
            that belong to tokens there are, these rows are divided by e_i and f_i, and log f_i is added to the scores
            of slot i. So a slot that is a mean is that of its tokens, and counts by their number. A row of n tokens is
            the same in both.
        dropout: share of the weights that is dropped.

    Returns:
        ``[B, H, P, D]``; zero in rows without tokens.

    Raises ``ValueError`` for more than n tokens: what E has no column for would be left out.
    """
    tokens, groups = key.shape[2], query.shape[1] // key.shape[1]
    if tokens > projection.length:
        raise ValueError(
            f"this attention projects rows of at most {projection.length:,} tokens, and got one of {tokens:,}: shorten "
            "the input, or convert the model with a larger length"
        )
    if valid is not None:
        key, value = (part.masked_fill(~valid[:, None, :, None], 0) for part in (key, value))
    second = projection.key if projection.value is None else projection.value
    k, v = (
        weight[:, :, :tokens].to(part.dtype) @ part for weight, part in ((projection.key, key), (second, value))
    )  # [B, G, slots, D]
    bias = None
    if short == "weighted" and (valid is not None or tokens < projection.length):
        shares = [reached(weight, tokens, valid) for weight in (projection.key, second)]  # [1 or B, G or 1, slots]
        k, v = (
            (part / torch.where(share > 0, share, 1)[..., None]).to(part.dtype)
            for part, share in zip((k, v), shares, strict=True)
        )
        bias = logarithm(shares[1])[:, :, None].to(query.dtype)
        bias = bias.repeat_interleave(groups, 1) if bias.shape[1] > 1 else bias
    return dense_product(query, k, v, bias, dropout, scale=scale)


def reached(weight: Tensor, tokens: int, valid: Tensor | None) -> Tensor:
    """Return the share of each slot's absolute weights that belong to the tokens of a row.

    weight: ``[C, slots, n]``; valid: bool ``[B, tokens]`` or None. Returns ``[1 or B, C, slots]`` in float32, or
    float64 for such a weight; 1 for a slot without weights.
    """
    size = weight.abs() if weight.dtype == torch.float64 else weight.float().abs()
    whole, own = size.sum(-1), size[:, :, :tokens]
    part = own.sum(-1)[None] if valid is None else torch.einsum("ckn,bn->bck", own, valid.to(own.dtype))
    some = whole > 0
    return torch.where(some, part / torch.where(some, whole, 1), 1)


def logarithm(share: Tensor) -> Tensor:
    """Return the logarithm of shares ``[..., slots]``, -inf for 0; 0 for all slots where all shares are 0."""
    some = share > 0
    logs = torch.where(some, torch.where(some, share, 1).log(), -torch.inf)
    return logs.masked_fill(~some.any(-1, keepdim=True), 0)  # no softmax over nothing: values are zero there
