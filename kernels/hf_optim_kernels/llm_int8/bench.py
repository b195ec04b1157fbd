"""Contenders for LLM.int8(): inputs with eight outlier columns."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from ..common.benchmark import Contender, bytes_of, copies_of, device, modules_of
from . import layer, naive

OUTLIERS = 8


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """The ways to run a layer of shape [N, K] on M rows, of which ``OUTLIERS`` columns are twenty times the others."""
    x = torch.randn(M, K, device=device(), dtype=dtype)
    x[:, torch.randperm(K, device=device())[:OUTLIERS]] *= 20
    linear = nn.Linear(K, N, bias=False, device=device(), dtype=dtype).requires_grad_(False)
    held = layer.LLMInt8Linear.from_linear(linear)
    flops, size = 2 * M * N * K, bytes_of((held.weight, held.w_scale))
    wanted = naive.llm_int8(x.double(), held.weight, held.w_scale, None, held.threshold)
    calls = [partial(_call, each, x) for each in modules_of(held)]
    found = [Contender("llm_int8", calls, size, flops, wanted, math="int8")]
    dense = [partial(nn.functional.linear, x, *copy) for copy in copies_of((linear.weight.data,))]
    exact = x.double() @ linear.weight.double().T
    found.append(Contender("dense", dense, bytes_of((linear.weight,)), flops, exact, dense=True))
    return found


@torch.no_grad()
def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)
