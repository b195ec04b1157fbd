"""The operators ``hash_vectors``, ``nearest``, ``sorted_runs`` and ``runs_of_last`` of ``torch.ops.hf_optim`` (see
``naive``). Importing this registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations and no gradients, and nothing waits for the host.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import NOWHERE, Cut, Runs

__all__ = ["NOWHERE", "Cut", "Runs", "hash_vectors", "nearest", "runs_of_last", "sorted_runs", "unsupported"]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LARGEST_VECTOR, MOST_BUCKETS, MOST_COLUMNS = 128, 2**14, 64


def unsupported(vectors: Tensor, columns: int = 1, factors: int = 1) -> str | None:
    """Return why the kernels do not take these vectors ``[B, H, n, D]`` for hashing; None if they do.

    Args:
        columns: of the rotation of a round.
        factors: how many hashes make a bucket.
    """
    if vectors.dtype not in DTYPES:
        return f"{vectors.dtype} vectors"
    if vectors.shape[3] > LARGEST_VECTOR:
        return f"vectors of {vectors.shape[3]} entries: {LARGEST_VECTOR} is the most"
    if columns > MOST_COLUMNS or factors > 2:
        return f"{factors} hashes of {columns} columns: two of {MOST_COLUMNS} are the most"
    return None


def hash_vectors(vectors: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Return the buckets of ``naive.hash_vectors``. Raises ``ValueError`` if sizes do not fit each other."""
    shape, columns = vectors.shape, sum(factors) // 2
    if rotations.ndim != 4 or rotations.shape[:2] != (shape[1], shape[3]) or rotations.shape[3] != columns:
        raise ValueError(
            f"hash_vectors takes rotations [{shape[1]}, {shape[3]}, rounds, {columns}], not {list(rotations.shape)}"
        )
    if rotations.dtype != torch.int32 or not factors or any(each < 2 or each % 2 for each in factors):
        raise ValueError(f"hash_vectors takes int32 rotations and even factors, not {rotations.dtype} and {factors}")
    if prod(factors) > MOST_BUCKETS:
        raise ValueError(f"hash_vectors takes at most {MOST_BUCKETS} buckets, not {prod(factors)}")
    return _hash(vectors.detach(), rotations, list(factors))


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return ``naive.nearest``. Raises ``ValueError`` if sizes do not fit each other."""
    heads, width = vectors.shape[1], vectors.shape[3]
    if centroids.ndim != 3 or centroids.shape[2] != width or heads % centroids.shape[0]:
        raise ValueError(f"nearest takes centroids [G, C, {width}] of {heads} heads, not {list(centroids.shape)}")
    if centroids.shape[1] > MOST_BUCKETS:
        raise ValueError(f"nearest takes at most {MOST_BUCKETS} centroids, not {centroids.shape[1]}")
    return _nearest(vectors.detach(), centroids.detach())


def sorted_runs(buckets: Tensor, cut: Cut) -> Runs:
    """Return ``naive.sorted_runs``. Raises ``ValueError`` for buckets or a cut that it does not take."""
    if buckets.dtype not in (torch.int16, torch.int32) or buckets.ndim != 4:
        raise ValueError(f"sorted_runs takes int16 or int32 buckets [B, H, rounds, n], not {buckets.dtype} "
                         f"{list(buckets.shape)}")  # fmt: skip
    if not 1 <= cut.buckets <= MOST_BUCKETS or cut.chunk < 1 or min(cut.before, cut.after, cut.lonely) < 0:
        raise ValueError(f"sorted_runs does not take {cut}")
    return Runs(*_sort(buckets, list(map(int, cut))))


def runs_of_last(
    of_queries: Tensor, of_keys: Tensor, buckets: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``naive.runs_of_last``. Raises ``ValueError`` if sizes do not fit each other."""
    one, other = of_queries.shape, of_keys.shape
    if len(one) != 3 or len(other) != 3 or one[0] != other[0] or one[1] % other[1] or one[2] != other[2]:
        raise ValueError(f"runs_of_last takes buckets [B, H, n] and [B, G, n], not {list(one)} and {list(other)}")
    if not 1 <= buckets <= MOST_BUCKETS or width < 0:
        raise ValueError(f"runs_of_last takes 1 to {MOST_BUCKETS} buckets and a width from 0 on: {buckets}, {width}")
    return _last(of_queries, of_keys, buckets, width)


@torch.library.custom_op("hf_optim::hash_vectors", mutates_args=())
def _hash(vectors: Tensor, rotations: Tensor, factors: list[int]) -> Tensor:
    """Return ``naive.hash_vectors``."""
    if not can_run_triton(vectors) or unsupported(vectors, sum(factors) // 2, len(factors)):
        return naive.hash_vectors(vectors, rotations, tuple(factors)).contiguous()
    from . import launch

    return launch.hash_vectors(_flat(vectors), rotations.contiguous(), tuple(factors))


@_hash.register_fake
def _(vectors, rotations, factors) -> Tensor:
    B, H, n, _ = vectors.shape
    return vectors.new_empty((B, H, rotations.shape[2], n), dtype=torch.int16)


@torch.library.custom_op("hf_optim::nearest_centroid", mutates_args=())
def _nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return ``naive.nearest``."""
    if not can_run_triton(vectors) or unsupported(vectors):
        return naive.nearest(vectors, centroids)
    from . import launch

    return launch.nearest(_flat(vectors), centroids.float().contiguous())


@_nearest.register_fake
def _(vectors, centroids) -> Tensor:
    return vectors.new_empty(vectors.shape[:3], dtype=torch.int16)


@torch.library.custom_op("hf_optim::sorted_runs", mutates_args=())
def _sort(buckets: Tensor, numbers: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return ``naive.sorted_runs``: ``numbers`` are the fields of ``Cut``."""
    most, chunk, before, after, whole, causal, step, lonely = numbers
    cut = Cut(most, chunk, before, after, bool(whole), bool(causal), step, lonely)
    if not can_run_triton(buckets):
        return tuple(each.contiguous() for each in naive.sorted_runs(buckets, cut))  # type: ignore[return-value]
    from . import launch

    return tuple(launch.sorted_runs(buckets.contiguous(), cut))  # type: ignore[return-value]


@_sort.register_fake
def _(buckets, numbers) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(buckets.new_empty(buckets.shape, dtype=torch.int32) for _ in range(6))  # type: ignore[return-value]


@torch.library.custom_op("hf_optim::runs_of_last", mutates_args=())
def _last(of_queries: Tensor, of_keys: Tensor, buckets: int, width: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``naive.runs_of_last``."""
    if not can_run_triton(of_queries):
        found = naive.runs_of_last(of_queries, of_keys, buckets, width)
        return found[0].contiguous(), found[1].contiguous(), found[2].contiguous(), found[3].contiguous()
    from . import launch

    return launch.runs_of_last(of_queries.contiguous(), of_keys.contiguous(), buckets, width)


@_last.register_fake
def _(of_queries, of_keys, buckets, width) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    one, other = (each.new_empty((*each.shape[:2], 1, each.shape[2]), dtype=torch.int32)
                  for each in (of_queries, of_keys))  # fmt: skip
    return one, other, torch.empty_like(one), torch.empty_like(one)


def _flat(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
