"""The operator ``torch.ops.hf_optim.ring_attention`` (see ``naive``). Importing this module registers it.

On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). It has a fake implementation, and no gradient: it is for decoding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.support import can_run_triton as can_run_triton
from ..common.support import unsupported_attention
from . import naive

LARGEST_HEAD, MOST_HEADS = 256, 64
LARGEST_RING = 2**31 - 1  # numbers of the keys of a ring


def unsupported(query: Tensor, key: Tensor, value: Tensor, slots: int) -> str | None:
    """Return why the kernels do not take ``[B, H, N, D]`` tensors and rings of ``slots`` keys; None if they do."""
    problem = unsupported_attention(query, key, value, LARGEST_HEAD)
    if problem is None and query.shape[1] % key.shape[1]:
        problem = f"{query.shape[1]} query heads do not share {key.shape[1]} key heads evenly"
    if problem is None and query.shape[1] // key.shape[1] > MOST_HEADS:
        problem = f"{query.shape[1] // key.shape[1]} query heads of a key head"
    if problem is None and slots * max(query.shape[3], value.shape[3]) > LARGEST_RING:
        problem = f"rings of {slots} keys"
    return problem


def plan(rings: Sequence[Sequence[int]], rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return items and merges of rings for a batch: int64 ``[n, 8]`` and ``[m, 4]``, made once for a cache.

    Args:
        rings: as the tensor of ``naive.ring_attention``.
        rows: of the batch.
    """
    from . import launch

    items, merges = launch.items_of(rings, rows, launch.processors(device))
    of_merges = torch.tensor(merges, dtype=torch.int64, device=device).view(-1, 4)
    return torch.tensor(items, dtype=torch.int64, device=device), of_merges


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
    items: Tensor,
    merges: Tensor,
    size: int,
    ramp: int,
    scale: float,
) -> Tensor:
    """Return the attention ``[B, H, Dv]`` of a new token, which is written to the rings; see ``naive``.

    Args:
        items, merges: ``plan`` of the rings.
    """
    call = _operator if torch.compiler.is_compiling() else _run
    return call(
        query, key, value, keys, values, tokens, rings, counts, shares, items, merges, size, ramp, scale
    )  # fmt: skip


def _run(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, rings: Tensor,
    counts: Tensor, shares: Tensor | None, items: Tensor, merges: Tensor, size: int, ramp: int, scale: float,
) -> Tensor:  # fmt: skip
    if not can_run_triton(query):
        return naive.ring_attention(
            query, key, value, keys, values, tokens, rings, counts, shares, size, ramp, scale
        )  # fmt: skip
    from . import launch

    query, key, value = (each if each.stride(-1) == 1 else each.contiguous() for each in (query, key, value))
    return launch.ring_attention(
        query, key, value, keys, values, tokens, counts, shares, items, merges, size, ramp, scale
    )  # fmt: skip


@torch.library.custom_op("hf_optim::ring_attention", mutates_args=("keys", "values"))
def _operator(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, tokens: Tensor, rings: Tensor,
    counts: Tensor, shares: Tensor | None, items: Tensor, merges: Tensor, size: int, ramp: int, scale: float,
) -> Tensor:  # fmt: skip
    """Return ``ring_attention``."""
    return _run(query, key, value, keys, values, tokens, rings, counts, shares, items, merges, size, ramp, scale)


@_operator.register_fake
def _(query, key, value, *_) -> Tensor:
    return query.new_empty((*query.shape[:2], value.shape[2]))
