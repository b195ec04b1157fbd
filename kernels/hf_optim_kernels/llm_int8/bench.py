"""Contenders for LLM.int8(): inputs with eight outlier columns."""

from __future__ import annotations

import torch
from torch import nn

from ..common import benchmark
from ..common.benchmark import Contender
from . import layer, naive

OUTLIERS = 8


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the ways to run a layer of shape [N, K] on M rows; ``OUTLIERS`` columns are twenty times the others."""
    x = torch.randn(M, K, device=benchmark.device(), dtype=dtype)
    x[:, torch.randperm(K, device=benchmark.device())[:OUTLIERS]] *= 20
    linear = nn.Linear(K, N, bias=False, device=benchmark.device(), dtype=dtype).requires_grad_(False)
    packed = layer.LLMInt8Linear.from_linear(linear)
    size = benchmark.bytes_of((packed.weight, packed.w_scale))
    reference = naive.llm_int8(x.double(), packed.weight, packed.w_scale, None, packed.threshold)
    ours = Contender("llm_int8", benchmark.calls_of(packed, x), size, 2 * M * N * K, reference, math="int8")
    return [ours, benchmark.dense_contender(x, linear.weight.data)]
