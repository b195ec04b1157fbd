"""Contenders for LLM.int8(): inputs with eight outlier columns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable
from . import layer, naive

OUTLIERS = 8


def random_inputs(rows: int, K: int, dtype: torch.dtype) -> Tensor:
    """Return inputs [rows, K] of which ``OUTLIERS`` columns are twenty times the others."""
    x = torch.randn(rows, K, device=benchmark.device(), dtype=dtype)
    x[:, torch.randperm(K, device=benchmark.device())[:OUTLIERS]] *= 20
    return x


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return a random layer of shape [N, K]."""
    from . import launch, tiles

    linear = nn.Linear(K, N, bias=False, device=benchmark.device(), dtype=dtype).requires_grad_(False)
    packed = layer.LLMInt8Linear.from_linear(linear)
    weights, threshold = [module.tensors() for module in benchmark.modules_of(packed)], packed.threshold
    return [
        Tunable(
            op="llm-int8",
            shape=(N, K),
            dtype=dtype,
            inputs=lambda rows: random_inputs(rows, K, dtype),
            calls=lambda x, config: [partial(launch.llm_int8, x, weight, threshold, config) for weight in weights],
            candidates=lambda rows: [tiles.default(rows, N, K), *tiles.candidates(rows, N, K)],
            reference=lambda x: naive.llm_int8(x.double(), packed.weight, packed.w_scale, None, threshold),
        )
    ]


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the ways to run a layer of shape [N, K] on M rows; ``OUTLIERS`` columns are twenty times the others."""
    x = random_inputs(M, K, dtype)
    linear = nn.Linear(K, N, bias=False, device=benchmark.device(), dtype=dtype).requires_grad_(False)
    packed = layer.LLMInt8Linear.from_linear(linear)
    size = benchmark.bytes_of((packed.weight, packed.w_scale))
    reference = naive.llm_int8(x.double(), packed.weight, packed.w_scale, None, packed.threshold)
    ours = Contender("llm_int8", benchmark.calls_of(packed, x), size, 2 * M * N * K, reference, math="int8")
    return [ours, benchmark.dense_contender(x, linear.weight.data)]
