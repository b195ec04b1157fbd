"""The specification: attention of a few queries to a key/value cache, in PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return the attention of ``query`` to ``key`` and ``value``: ``[B, Q, H, Dv]``, in the dtype of ``query``.

    Scores and sums are float32. Query head ``h`` reads key head ``h // (H // G)``.

    Args:
        query: ``[B, H, Q, D]``; Q is the number of new tokens, 1 in decoding.
        key, value: ``[B, G, N, D]`` and ``[B, G, N, Dv]``, with H a multiple of G.
        mask: bool ``[B or 1, 1, Q, N]``, True where a query may attend; None for everywhere. A query that may attend
            nowhere has the output 0.
        ranges: ``mask_ranges`` of the mask. Without a mask, each query attends to all positions of its range.
        sinks: ``[H]``, a score for each head that takes part in the softmax and has no value; None for none.
        scale: multiplies the scores.
        softcap: bounds the scaled scores s by ``softcap * tanh(s / softcap)``; 0 for no bound.
    """
    B, H, Q, _ = query.shape
    group = H // key.shape[1]
    k, v = (t.float().repeat_interleave(group, dim=1) for t in (key, value))
    scores = query.float() @ k.transpose(2, 3) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None and ranges is not None:
        at = torch.arange(key.shape[2], device=key.device)
        mask = ((at >= ranges[..., :1]) & (at < ranges[..., 1:2]))[:, None]
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.float().reshape(1, H, 1, 1).expand(B, H, Q, 1)
        scores = torch.cat([scores, extra], dim=-1)
    weights = scores.softmax(dim=-1).nan_to_num(0.0)[..., : key.shape[2]]
    # A masked value is not read, whatever it is; 0 times infinity would be NaN.
    if mask is not None:
        v = v.masked_fill(~mask.any(dim=2)[..., None], 0.0)
    return (weights @ v).transpose(1, 2).to(query.dtype)


def mask_ranges(mask: Tensor) -> Tensor:
    """Return where the queries of a mask ``[B, 1, Q, N]`` may attend: int32 ``[B, Q, 3]``.

    Of each query: the first such position, the one behind the last, and how many there are; N, 0, 0 for none. Where
    the number is less than the length of the range, the mask has holes.
    """
    N = mask.shape[-1]
    at = torch.arange(N, dtype=torch.int32, device=mask.device)
    mask = mask[:, 0]
    first = torch.where(mask, at, N).amin(dim=-1)
    end = torch.where(mask, at + 1, 0).amax(dim=-1)
    return torch.stack([first, end, mask.sum(dim=-1, dtype=torch.int32)], dim=-1).to(torch.int32)
