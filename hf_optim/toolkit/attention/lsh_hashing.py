"""Locality-sensitive hashing by random rotations: ``h(x) = argmax([x R; -x R])``, exact on every device.

Kitaev et al., arXiv 2001.04451, section 2. Vectors and rotations are rounded to whole numbers whose products and sums
float64 holds exactly, so a vector has the same bucket by itself and in a batch, on a CPU and on a GPU: in decoding as
in the forward before it. The rounding is 2^-22 of the largest entry of a vector.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

VECTOR_BITS = 22  # of an entry, beside its sign
ROTATION_BITS = 18  # behind the point; the largest entry is below 8
WIDEST = 1024  # entries of a vector: 22 + (3 + 18) + 10 bits are those of a float64


def draw_rotations(heads: int, width: int, rounds: int, factors: Sequence[int], seed: int) -> Tensor:
    """Return Gaussian rotations as whole numbers, int32 ``[H, D, rounds, sum(factors) // 2]``, on the CPU.

    Args:
        heads, width: of the vectors; a width of at most ``WIDEST``.
        rounds: of hashing, each with rotations of its own.
        factors: of the number of buckets, even; ``(1,)`` for one bucket, which needs no rotation.
        seed: of the numbers.
    """
    if width > WIDEST:
        raise ValueError(f"vectors of {width} entries cannot be hashed exactly: at most {WIDEST}")
    generator = torch.Generator().manual_seed(seed)
    shape = heads, width, rounds, columns_of(factors)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64) * 2**ROTATION_BITS
    most = 2 ** (ROTATION_BITS + 3) - 1
    return drawn.round().clamp(-most, most).int()


def columns_of(factors: Sequence[int]) -> int:
    """Return how many columns a rotation has for these factors of the number of buckets."""
    return sum(factors) // 2


def hash_vectors(vectors: Tensor, rotations: Tensor, factors: Sequence[int]) -> Tensor:
    """Return the buckets of vectors, int64 ``[R, H, rounds, n]``, from 0 to ``prod(factors) - 1``.

    With several factors a bucket is ``h_1 + f_1 h_2 + f_1 f_2 h_3 ...``, each hash with columns of its own.

    Args:
        vectors: ``[R, H, n, D]``, any float dtype.
        rotations: of ``draw_rotations``, on the same device.
        factors: those that it was given.
    """
    batch, heads, count, _ = vectors.shape
    rounds = rotations.shape[2]
    if prod(factors) == 1:
        return torch.zeros(batch, heads, rounds, count, dtype=torch.int64, device=vectors.device)
    exact = vectors.detach().double()
    largest = exact.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    whole = (exact / largest * 2**VECTOR_BITS).round()
    products = (whole @ rotations.flatten(2).double()).unflatten(-1, (rounds, -1))
    buckets, begin, step = None, 0, 1
    for factor in factors:
        part = products[..., begin : begin + factor // 2]
        high, low = part.max(-1), part.min(-1)
        one = torch.where(high.values >= -low.values, high.indices, low.indices + factor // 2) * step
        buckets = one if buckets is None else buckets + one
        begin, step = begin + factor // 2, step * factor
    assert buckets is not None
    return buckets.transpose(2, 3)
