"""From tensors to launches: one of the forward, two of the backward. Nothing waits for the host."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from .kernel import _forward_kernel, _key_kernel, _query_kernel
from .naive import ALONE, Buckets, reach

# Places of a block, the most of them; those of heads above 64 in the backward, and in float32.
BLOCK, SMALL = 64, 32


def forward(
    query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float
) -> tuple[Tensor, Tensor]:
    """Return ``naive.bucket_attention``: out with the strides of ``[B, N, H, Dv]``, lse float32.

    The last dimension of every tensor is contiguous, and of places all.
    """
    (B, H, N, _), DV = query.shape, value.shape[3]
    out = query.new_empty((B, N, H, DV)).transpose(1, 2)
    lse = torch.empty((B, H, N), dtype=torch.float32, device=query.device)
    if not buckets.gathered:  # a token may have no place
        out.zero_()
        lse.fill_(float("-inf"))
    small = query.dtype == torch.float32
    tensors = (query, key, value, places_q, places_k, out, lse)
    _run(_forward_kernel, tensors, query, key, value, places_q, buckets, scale, (out,), small, by_key=False)
    return out, lse


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
    places_q: Tensor, places_k: Tensor, buckets: Buckets, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return ``naive.gradients``; arguments as of ``forward``."""
    (B, H, _, D), (G, M), DV = query.shape, key.shape[1:3], value.shape[3]
    delta = (grad_out.float() * out).sum(-1)
    if grad_lse is not None:
        delta -= grad_lse.masked_fill(lse == float("-inf"), 0.0)
    delta = delta.contiguous()
    make = torch.empty if buckets.gathered else torch.zeros
    grad_query, grad_key, grad_value = (
        make(shape, dtype=query.dtype, device=query.device) for shape in (query.shape, (B, H, M, D), (B, H, M, DV))
    )
    small = query.dtype == torch.float32 or max(D, DV) > 64
    tensors = (query, key, value, places_q, places_k, lse, delta, grad_out)
    common = (query, key, value, places_q, buckets, scale)
    _run(_query_kernel, (*tensors, grad_query), *common, (grad_out, grad_query), small, by_key=False)
    results = (grad_out, grad_key, grad_value)
    _run(_key_kernel, (*tensors, grad_key, grad_value), *common, results, small, by_key=True)
    if G != H:
        grad_key, grad_value = (each.unflatten(1, (G, H // G)).sum(2) for each in (grad_key, grad_value))
    return grad_query, grad_key, grad_value


def _run(
    kernel: Any, tensors: tuple, query: Tensor, key: Tensor, value: Tensor, places_q: Tensor, buckets: Buckets,
    scale: float, others: tuple, small: bool, by_key: bool,
) -> None:  # fmt: skip
    (B, H, N, D), DV = query.shape, value.shape[3]
    chunks = places_q.shape[2] // buckets.width_q
    before, after = reach(buckets, chunks)
    most = SMALL if small else BLOCK
    rows, step = (min(most, _padded(width)) for width in (buckets.width_q, buckets.width_k))
    blocks_q, blocks_k = triton.cdiv(buckets.width_q, rows), triton.cdiv(buckets.width_k, step)
    programs = B * H * chunks * (blocks_k if by_key else blocks_q)
    if not programs:
        return
    log2e = math.log2(math.e)
    numbers = (
        H, key.shape[1], N, D, DV, chunks, buckets.width_q, buckets.width_k, after if by_key else before,
        before + after + 1, blocks_q, blocks_k,
        *(stride for each in (query, key, value, *others) for stride in each.stride()[:3]),
    )  # fmt: skip
    block_d, block_dv = _padded(D), _padded(DV)
    constants = {
        "ROWS": rows, "STEP": step, "BLOCK_D": block_d, "BLOCK_DV": block_dv, "FULL_D": block_d == D,
        "FULL_DV": block_dv == DV, "WRAP": buckets.wrap, "CAUSAL": buckets.causal, "NO_SELF": buckets.no_self,
        "GATHERED": buckets.gathered, "MATH": compute_constants(query.dtype, kernel)["MATH"],
    }  # fmt: skip
    warps = 4
    stages = 1 if query.dtype == torch.float32 else 2
    code = (
        *(each.dtype for each in tensors), *(is_aligned(each) for each in tensors), *_kinds(numbers),
        *constants.values(), warps, stages,
    )  # fmt: skip
    launch(
        kernel, (programs, 1, 1), (*tensors, scale * log2e, ALONE * log2e, *numbers), constants, num_warps=warps,
        num_stages=stages, key=code,
    )  # fmt: skip


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _kinds(numbers: tuple) -> tuple[int, ...]:
    """Return what Triton specializes of integers: 1, multiples of 16, and whether they fit in 32 bits."""
    return tuple(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers)
