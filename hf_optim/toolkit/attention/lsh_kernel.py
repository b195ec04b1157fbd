"""LSH attention by the installed kernel for chunks of buckets, on a GPU.

The kernel computes chunks and their neighbours in one order of places. That is the ``trax`` scheme, whose rounds form a
ring, for rows without padding, and one round of the ``paper`` scheme. What counts keys of several rounds once, or cuts
each bucket by itself, is not expressed by it.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from functools import lru_cache
from typing import Any

from torch import Tensor

from .lsh_places import PAPER, TRAX, LshScheme

LSH_KERNEL = "hf_optim_kernels.bucket_attention.op"  # where it is installed


@lru_cache(maxsize=1)
def _installed_buckets() -> Any:
    try:
        return importlib.import_module(LSH_KERNEL)
    except ImportError:
        return None


def bucket_kernel(query: Tensor, value: Tensor, scheme: LshScheme, dropout: float) -> Any:
    """Return the module of the kernel if it computes chunks of these tensors; None if it does not.

    Args:
        query, value: ``[R, H, n, D]``.
        scheme: says which pairs are computed.
        dropout: share of the weights that is dropped.
    """
    fits = scheme.scheme == TRAX or (scheme.scheme == PAPER and scheme.rounds == 1)
    chunks = scheme.rounds * -(-query.shape[2] // scheme.chunk)
    twice = scheme.scheme == TRAX and scheme.before + scheme.after >= chunks  # chunks of the ring are seen twice
    if query.device.type != "cuda" or not fits or twice or dropout:
        return None
    module = _installed_buckets()
    return None if module is None or module.unsupported(query, query, value) is not None else module


def kernel_chunks(
    module: Any, query: Tensor, key: Tensor, value: Tensor, places: Tensor, scheme: LshScheme, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the attention of chunks ``[R, H, C, m, E]`` and its log-sum-exp ``[R, H, C, m]``.

    Args:
        module: of ``bucket_kernel``.
        query, key, value: ``[R, H, C, m, D or E]``.
        places: int ``[R, H, C, m]``: the tokens in chunks, -1 for none.
        scheme: says which pairs are computed.
        causal: a token sees no later ones.
    """
    about = module.Buckets(
        scheme.chunk, scheme.chunk, scheme.before, scheme.after, scheme.scheme == TRAX, causal, True, True
    )
    at = places.flatten(2, 3).int()
    out, total = module.bucket_attention(*(part.flatten(2, 3) for part in (query, key, value)), at, at, about, 1.0)
    return out.reshape(value.shape), total.reshape(places.shape)
