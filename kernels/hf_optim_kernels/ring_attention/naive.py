"""The specification: attention of a new token to rings that hold the nearest keys of each head, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def ring_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Tensor,
    values: Tensor,
    tokens: Tensor,
    rings: Tensor,
    counts: Tensor,
    shares: Tensor | None,
    size: int,
    ramp: int,
    scale: float,
) -> Tensor:
    """Write the key and value of a new token to the rings, and return its attention: ``[B, H, Dv]``.

    The key of position i is in slot ``i mod C`` of its ring. A key x tokens away is seen by head h if x is less than
    ``counts[h]``, and weighs ``min((z S + R - x) / R, 1)``, with ``z = clamp(shares[h], 0, 1)``; not at all where that
    is not above 0. Query head ``h`` reads key head ``h // (H // G)``. Scores and sums are float32, or float64 as the
    query.

    Args:
        query: ``[B, H, D]``.
        key, value: ``[B, G, D]`` and ``[B, G, Dv]``, of the same token.
        keys, values: ``[T, D]`` and ``[T, Dv]``: all rings of all rows, behind each other. They are changed.
        tokens: int64 ``[B]``: how many tokens each row has, with the new one.
        rings: int64 ``[G, 4]``: of each key head where the ring of the first row begins, how far those of the next rows
            lie behind it, C, and the largest count of its query heads, at most C.
        counts: int32 ``[H]``: how many nearest keys a head sees, the new one among them.
        shares: float32 ``[H]``; None if a key weighs 1 wherever it is seen.
        size, ramp: S and R, in tokens; not used without ``shares``.
        scale: multiplies the scores.
    """
    B, H, _ = query.shape
    group = H // key.shape[1]
    accurate = torch.promote_types(query.dtype, torch.float32)
    out = query.new_empty(B, H, value.shape[2])
    position = tokens - 1
    for g, (first, apart, slots, count) in enumerate(rings.tolist()):
        begin = first + apart * torch.arange(B, device=query.device)
        new = begin + position % slots
        keys[new], values[new] = key[:, g], value[:, g]
        away = torch.arange(count, device=query.device)
        at = position[:, None] - away
        index = begin[:, None] + at % slots
        heads = slice(g * group, (g + 1) * group)
        seen = (away < counts[heads, None]) & (at >= 0)[:, None]  # [B, group, count]
        # What is not seen is not read, whatever it is: 0 times infinity would be NaN.
        k, v = (part[index].to(accurate).masked_fill((at < 0)[..., None], 0) for part in (keys, values))
        scores = query[:, heads].to(accurate) @ k.mT * scale
        if shares is not None:
            reach = shares[heads, None].to(accurate).clamp(0, 1) * size + ramp
            weight = ((reach - away) / ramp).clamp(max=1)
            seen = seen & (weight > 0)
            scores = scores + weight.clamp_min(torch.finfo(accurate).tiny).log()
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
        out[:, heads] = (weights @ v).to(query.dtype)
    return out
