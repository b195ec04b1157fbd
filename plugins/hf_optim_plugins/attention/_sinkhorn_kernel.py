"""The door to the kernel of chunks, for blocks and what was sorted beside them: used where it is installed.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ._sinkhorn_attention import own_and_sorted

SORTED_KERNEL = "hf_optim_kernels.bucket_attention.op"  # where it is installed
SORTED_KERNEL_DEVICES = ("cuda",)


@lru_cache(maxsize=1)
def _installed_chunks() -> Any:
    try:
        return importlib.import_module(SORTED_KERNEL)
    except ImportError:
        return None


def blocks_by_kernel(
    query: Tensor, own: tuple[Tensor, Tensor], weights: Tensor | None, causal: bool, scale: float
) -> Tensor | None:
    """Return ``block_attention`` of rows without padding, ``[R, H, N, L, D]``; None if no kernel computes it.

    Args:
        query: ``[R, H, N, L, D]``.
        own: keys and values ``[R, G, N, L, D]``.
        weights: ``[R, G, N, N]``, by which blocks are sorted; None if none are.
        causal: a token sees its block up to itself, and the first block nothing that was sorted to it.
        scale: of the scores.
    """
    module = _installed_chunks() if query.device.type in SORTED_KERNEL_DEVICES else None
    if module is None or module.unsupported(query[:, :, 0], own[0][:, :, 0], own[1][:, :, 0]) is not None:
        return None
    rows, heads, blocks, size, _ = query.shape
    key, value = own if weights is None else (own_and_sorted(weights, part) for part in own)
    key, value = (part.flatten(2, 3) for part in (key, value))
    if heads != key.shape[1]:
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
    place = torch.arange(blocks * size, dtype=torch.int32, device=query.device).view(blocks, size)
    seen = place
    if weights is not None:  # keys that were sorted there come before any token, but to the first block come none
        block = torch.arange(blocks, dtype=torch.int32, device=query.device)[:, None]
        seen = torch.cat([place, (block.clamp_max(1) - 1 if causal else 0 * block).expand(-1, size)], 1)
    places = [part.flatten().expand(rows, heads, -1) for part in (place, seen)]
    about = module.Buckets(size, seen.shape[1], causal=causal, gathered=True)
    out, _ = module.bucket_attention(query.flatten(2, 3), key, value, *places, about, scale)
    return out.unflatten(2, (blocks, size))  # type: ignore[no-any-return]
