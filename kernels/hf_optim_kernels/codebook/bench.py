"""What ``hf-optim bench`` times of ``hf_optim::codebook_linear``."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ..common import benchmark
from ..common.benchmark import Contender
from . import layer, naive

# Of the weights of a real model, three in a thousand are outliers.
SHARE = 0.003
MATH = "bfloat16"


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Codes of 2, 3 and 4 bits with outliers, and the dense product."""
    found = [contender(N, K, M, bits, dtype) for bits in (2, 3, 4)]
    weight = torch.randn(N, K, device=benchmark.device()).to(dtype) * 0.02
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    calls = [partial(nn.functional.linear, x, *copy) for copy in benchmark.copies_of((weight,))]
    exact = x.double() @ weight.double().T
    flops = 2 * M * N * K
    return [*found, Contender("dense", calls, benchmark.bytes_of((weight,)), flops, exact, MATH, dense=True)]


def random_module(N: int, K: int, bits: int, dtype: torch.dtype) -> SimpleNamespace:
    """What ``prepack`` reads of a module, of random codes, centroids and outliers."""
    device = benchmark.device()
    outlying = torch.rand(N, K, device=device) < SHARE
    codes = torch.randint(0, 2**bits, (N, K), device=device, dtype=torch.uint8).masked_fill_(outlying, 0)
    centroids = (torch.randn(2**bits, device=device) * 0.02).sort().values.to(dtype)
    columns = outlying.nonzero()[:, 1]
    return SimpleNamespace(
        bits=bits,
        centroids=centroids,
        outliers=(torch.randn(len(columns), device=device) * 0.2).to(dtype),
        outlier_counts=outlying.sum(1),
        outlier_columns=columns.to(torch.int16 if K < 1 << 15 else torch.int32),
        bias=None,
        codes=lambda: codes,
    )


def contender(N: int, K: int, M: int, bits: int, dtype: torch.dtype) -> Contender:
    """The packed weight of a random weight on ``M`` rows of random inputs."""
    packed_weight = layer.prepack(random_module(N, K, bits, dtype))
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    held = (packed_weight.words, packed_weight.table, packed_weight.values, packed_weight.columns, packed_weight.starts)
    reference = x.double() @ naive.dequantize(*held, K, torch.float64).T
    size = N * K * bits // 8 + benchmark.bytes_of(
        (packed_weight.values, packed_weight.columns, packed_weight.owners, packed_weight.starts)
    )
    calls = [partial(_call, module, x) for module in benchmark.modules_of(packed_weight)]
    return Contender(f"codebook{bits}", calls, size, 2 * M * N * K, reference, MATH)


def _call(packed_weight: nn.Module, x: Tensor) -> Tensor:
    with torch.inference_mode():
        return packed_weight(x)
