"""From tensors to launches. Nothing waits for the host."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from .kernel import _hash_kernel, _nearest_kernel
from .naive import Cut, Runs
from .sort_kernel import _begin_kernel, _count_kernel, _last_kernel, _run_kernel, _sum_kernel

# Vectors of a program, and tokens of a block that is sorted and of those it is compared with at a time.
VECTORS, BLOCK, STEP = 64, 128, 64


def hash_vectors(vectors: Tensor, rotations: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Return ``naive.hash_vectors``; the last dimension of vectors is contiguous, and of rotations all."""
    (B, H, N, D), (rounds, columns) = vectors.shape, rotations.shape[2:]
    found = torch.empty((B, H, rounds, N), dtype=torch.int16, device=vectors.device)
    blocks = triton.cdiv(N, VECTORS)
    constants = {
        "ROWS": VECTORS, "BLOCK_D": max(32, _padded(D)), "COLUMNS": _padded(columns), "FIRST": factors[0],
        "SECOND": factors[1] if len(factors) > 1 else 0,
    }  # fmt: skip
    warps = 8 if columns > 32 else 4
    numbers = (H, N, D, rounds, columns, blocks, *vectors.stride()[:3])
    _start(_hash_kernel, B * H * blocks, (vectors, rotations, found), numbers, constants, warps)
    return found


def nearest(vectors: Tensor, centroids: Tensor) -> Tensor:
    """Return ``naive.nearest``; the last dimension of vectors is contiguous, and of centroids all."""
    (B, H, N, D), (G, C) = vectors.shape, centroids.shape[:2]
    found = torch.empty((B, H, N), dtype=torch.int16, device=vectors.device)
    blocks = triton.cdiv(N, VECTORS)
    constants = {
        "ROWS": VECTORS, "BLOCK_D": _padded(D), "STEP": min(64, _padded(C)),
        "MATH": compute_constants(vectors.dtype, _nearest_kernel)["MATH"],
    }  # fmt: skip
    numbers = (H, G, N, D, C, blocks, *vectors.stride()[:3])
    _start(_nearest_kernel, B * H * blocks, (vectors, centroids, found), numbers, constants, 4)
    return found


def sorted_runs(buckets: Tensor, cut: Cut) -> Runs:
    """Return ``naive.sorted_runs``; buckets are contiguous."""
    N, rows = buckets.shape[-1], buckets[..., 0].numel()
    counts, begins, blocks = _tables(buckets, cut.buckets)
    found = Runs(*(torch.empty(buckets.shape, dtype=torch.int32, device=buckets.device) for _ in Runs._fields))
    numbers = (N, cut.buckets, blocks, cut.chunk, cut.before, cut.after, cut.step, cut.lonely)
    constants = {"WHOLE": cut.whole, "CAUSAL": cut.causal, "SIZE": BLOCK, "STEP": STEP}
    _start(_run_kernel, rows * blocks, (buckets, counts, begins, *found), numbers, constants, 4)
    return found


def runs_of_last(
    of_queries: Tensor, of_keys: Tensor, buckets: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return ``naive.runs_of_last``; buckets are contiguous."""
    (B, H, N), G = of_queries.shape, of_keys.shape[1]
    counts_k, begins_k, blocks = _tables(of_keys, buckets)
    counts_q, begins_q, _ = _tables(of_queries, buckets)
    order_k, order_q, low, high = (
        torch.empty((B, heads, 1, N), dtype=torch.int32, device=of_keys.device) for heads in (G, H, H, H)
    )
    constants = {"SIZE": BLOCK, "STEP": STEP}
    keys = (of_keys, counts_k, begins_k)
    for tensors, heads, own in (((*keys, *keys, order_k, order_k, order_k), G, True),
                                ((of_queries, counts_q, begins_q, *keys, order_q, low, high), H, False)):  # fmt: skip
        numbers = (H, G, N, buckets, blocks, width)
        _start(_last_kernel, B * heads * blocks, tensors, numbers, {"KEYS": own, **constants}, 4)
    return order_q, order_k, low, high


def _tables(buckets: Tensor, most: int) -> tuple[Tensor, Tensor, int]:
    """Return the tokens of each bucket before each block, int32 ``[rows, blocks, most + 1]``, where buckets begin,
    int32 ``[rows, most + 2]``, and how many blocks there are.
    """
    N, rows = buckets.shape[-1], buckets[..., 0].numel()
    blocks = triton.cdiv(N, BLOCK)
    counts = torch.zeros((rows, blocks, most + 1), dtype=torch.int32, device=buckets.device)
    begins = torch.empty((rows, most + 2), dtype=torch.int32, device=buckets.device)
    _start(_count_kernel, rows * blocks, (buckets, counts), (N, most, blocks), {"SIZE": BLOCK}, 4)
    size = min(64, max(16, triton.next_power_of_2(most + 1)))
    tiles = triton.cdiv(most + 1, size)
    _start(_sum_kernel, rows * tiles, (counts, begins), (most, blocks, tiles), {"SIZE": size, "STEP": 64}, 4)
    _start(_begin_kernel, rows, (begins,), (most,), {"SIZE": min(1024, triton.next_power_of_2(most + 1))}, 4)
    return counts, begins, blocks


def _start(kernel: Any, programs: int, tensors: tuple, numbers: tuple, constants: dict[str, Any], warps: int) -> None:
    if not programs:
        return
    key = (
        *(each.dtype for each in tensors), *(is_aligned(each) for each in tensors),
        *(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers), *constants.values(), warps,
    )  # fmt: skip
    launch(kernel, (programs, 1, 1), (*tensors, *numbers), constants, num_warps=warps, num_stages=1, key=key)


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))
