"""LSH attention by the installed kernels, on a GPU: hashing, sorting, and the attention of sorted tokens.

Schemes in which a key counts once are one operator for all rounds. In the ``trax`` scheme the rounds form a ring, which
is computed as chunks and their neighbours in one order of places, for rows without padding.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from torch import Tensor

from .lsh_places import BUCKET, TRAX, LshScheme

# Where kernels are installed, and the devices on which they are used.
LSH_CHUNK_KERNEL = "hf_optim_kernels.bucket_attention.op"
LSH_ORDER_KERNEL = "hf_optim_kernels.bucket_order.op"
LSH_RUN_KERNEL = "hf_optim_kernels.run_attention.op"
LSH_KERNEL_DEVICES = ("cuda",)


@lru_cache(maxsize=3)
def _installed_lsh(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def _lsh_kernel_for(part: Tensor, name: str) -> Any:
    return _installed_lsh(name) if part.device.type in LSH_KERNEL_DEVICES else None


def buckets_by_kernel(vectors: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor | None:
    """Return the buckets of ``hash_vectors``, int16; None if no kernel computes them."""
    module = _lsh_kernel_for(vectors, LSH_ORDER_KERNEL)
    if module is None or module.unsupported(vectors, rotations.shape[3], len(factors)) or not rotations.shape[3]:
        return None
    return module.hash_vectors(vectors, rotations, tuple(factors))  # type: ignore[no-any-return]


def order_by_kernel(buckets: Tensor, scheme: LshScheme) -> Tensor | None:
    """Return ``sorted_tokens`` of buckets without padding ``[R, H, rounds, n]``; None if no kernel sorts them."""
    module = _lsh_kernel_for(buckets, LSH_ORDER_KERNEL)
    if module is None:
        return None
    cut = module.Cut(scheme.buckets, scheme.chunk, scheme.before, scheme.after, True)
    return module.sorted_runs(buckets.short(), cut).order.long()  # type: ignore[no-any-return]


def rounds_by_kernel(
    query: Tensor, value: Tensor, buckets: Tensor, scheme: LshScheme, causal: bool, padded: bool, dropout: float
) -> Tensor | None:
    """Return the attention of schemes in which a key counts once, ``[R, H, n, E]``; None if no kernel computes it.

    Args:
        query: ``[R, H, n, D]``.
        value: ``[R, G, n, E]``.
        buckets: ``[R, H, rounds, n]``, those of padding behind all others.
        scheme: says which pairs are computed.
        causal: a token sees no later ones.
        padded: there may be padding.
        dropout: share of the weights that is dropped.
    """
    ordering, module = (_lsh_kernel_for(query, name) for name in (LSH_ORDER_KERNEL, LSH_RUN_KERNEL))
    if module is None or ordering is None or dropout or module.unsupported(query, query, value) is not None:
        return None
    if scheme.rounds > module.MOST_ROUNDS:
        return None
    inside = scheme.scheme == BUCKET
    near = scheme.chunk if inside and causal else 0
    runs = ordering.sorted_runs(
        buckets.short(),
        ordering.Cut(
            scheme.buckets, scheme.chunk, scheme.before, scheme.after, not inside, inside and causal,
            scheme.step if inside else 0, near,
        ),
    )  # fmt: skip
    seen = module.Seen(scheme.before, scheme.after, causal, True, False, near, not padded, inside and causal)
    return module.run_attention(  # type: ignore[no-any-return]
        query, None, value, runs.order, runs.order, runs.low, runs.high, seen, 1.0, runs.codes, runs.first, runs.last
    )


def bucket_kernel(query: Tensor, value: Tensor, scheme: LshScheme, dropout: float) -> Any:
    """Return the module of the kernel if it computes the ring of ``trax`` for these tensors; None if it does not.

    Args:
        query, value: ``[R, H, n, D]``.
        scheme: says which pairs are computed.
        dropout: share of the weights that is dropped.
    """
    chunks = scheme.rounds * -(-query.shape[2] // scheme.chunk)
    twice = scheme.before + scheme.after >= chunks  # chunks of the ring are seen twice
    module = _lsh_kernel_for(query, LSH_CHUNK_KERNEL)
    if module is None or scheme.scheme != TRAX or twice or dropout:
        return None
    return None if module.unsupported(query, query, value) is not None else module


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
    about = module.Buckets(scheme.chunk, scheme.chunk, scheme.before, scheme.after, True, causal, True, True)
    at = places.flatten(2, 3).int()
    out, total = module.bucket_attention(*(part.flatten(2, 3) for part in (query, key, value)), at, at, about, 1.0)
    return out.reshape(value.shape), total.reshape(places.shape)
