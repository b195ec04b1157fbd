"""Contenders and tunables of ``hf-optim bench`` for attention of a new token to a cache in 16 bits.

A "layer of ``N`` outputs and ``K`` inputs" is attention of ``N`` channels here, in heads of 128 of which four share a
key head (fewer and smaller ones where that does not divide ``N``), of one new token to the ``K`` before it; ``M`` rows
are those of the batch. ``dense`` is PyTorch's attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable, with_config
from . import op

HEAD, GROUP, SCALE = 128, 4, 128**-0.5
MATH = "bfloat16"


def random_query(N: int, rows: int, dtype: torch.dtype) -> Tensor:
    """Return random queries ``[rows, heads, 1, head]`` of ``N`` channels."""
    head = math.gcd(N, HEAD)
    return torch.randn(rows, N // head, 1, head, device=benchmark.device()).to(dtype)


def random_cache(N: int, K: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return random keys and values ``[rows, key heads, K, head]``."""
    head = math.gcd(N, HEAD)
    heads = N // head // math.gcd(N // head, GROUP)
    draw = partial(torch.randn, rows, heads, K, head, device=benchmark.device())
    return draw().to(dtype), draw().to(dtype)


def exact(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Return attention ``[rows, N]`` in float64, one row at a time."""
    found = []
    for row in range(len(query)):
        k, v = (part[row].double().repeat_interleave(query.shape[1] // key.shape[1], 0) for part in (key, value))
        found.append(((query[row].double() @ k.mT * SCALE).softmax(-1) @ v).flatten())
    return torch.stack(found)


def dense_calls(query: Tensor, key: Tensor, value: Tensor) -> list[Callable[[], Tensor]]:
    """Return calls of the kernel on copies of a cache, together larger than the L2 cache."""
    copies = benchmark.copies_of((key, value))
    return [partial(_attend, query, k, v) for k, v in copies]


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return op.decode_attention(query, key, value, None, None, None, SCALE, 0.0).flatten(1)


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return attention to ``K`` tokens: positions of a block, and programs of a multiprocessor."""
    from . import launch

    held: dict[int, tuple[Tensor, Tensor]] = {}

    def cache_of(query: Tensor) -> tuple[Tensor, Tensor]:
        if len(query) not in held:
            held.clear()
            held[len(query)] = random_cache(N, K, len(query), dtype)
        return held[len(query)]

    def calls(query: Tensor, config: dict[str, int]) -> list[Callable[[], Tensor]]:
        return [with_config(launch.OP, config, call) for call in dense_calls(query, *cache_of(query))]

    return [
        Tunable(
            op=launch.OP,
            shape=(max(16, math.gcd(N, HEAD)),) * 2,
            dtype=dtype,
            inputs=lambda rows: random_query(N, rows, dtype),
            calls=calls,
            candidates=lambda rows: launch.candidates(),
            reference=lambda query: exact(query, *cache_of(query)),
            any_rows=True,
        )
    ]


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernel, and PyTorch's attention (``dense``)."""
    key, value = random_cache(N, K, M, dtype)
    query = random_query(N, M, dtype)
    size, flops, reference = benchmark.bytes_of((key, value)), 4 * M * N * K, exact(query, key, value)
    theirs = [partial(_sdpa, query, k, v) for k, v in benchmark.copies_of((key, value))]
    return [
        Contender("decode_attention", dense_calls(query, key, value), size, flops, reference, MATH),
        Contender("scaled_dot_product_attention", theirs, size, flops, reference, MATH, dense=True),
    ]


def _sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return scaled_dot_product_attention(query, key, value, scale=SCALE, enable_gqa=True).flatten(1)
