"""Contenders of ``hf-optim bench`` for ``hf_optim::codebook_linear``."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import torch

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable
from . import layer, naive

# Of the weights of a real model, three in a thousand are outliers.
SHARE = 0.003
MATH = "bfloat16"


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return codes of 2, 3 and 4 bits with outliers, and the dense product."""
    found = [contender(N, K, M, bits, dtype) for bits in (2, 3, 4)]
    weight = torch.randn(N, K, device=benchmark.device()).to(dtype) * 0.02
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    return [*found, benchmark.dense_contender(x, weight, MATH)]


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return random layers of shape [N, K], of 2, 3 and 4 bits; for many rows, weights are decoded without tiles."""
    return [_tunable(N, K, bits, dtype) for bits in (2, 3, 4)]


def _tunable(N: int, K: int, bits: int, dtype: torch.dtype) -> Tunable:
    from . import launch

    packed = layer.prepack(random_module(N, K, bits, dtype))
    weights = [module.tensors() for module in benchmark.modules_of(packed)]
    return Tunable(
        op=f"codebook{bits}",
        shape=(N, K),
        dtype=dtype,
        inputs=lambda rows: torch.randn(rows, K, device=benchmark.device(), dtype=dtype),
        calls=lambda x, config: [partial(launch.fused, x, weight, config) for weight in weights],
        candidates=lambda rows: launch.candidates(rows, N, K) if rows <= launch.MOST_ROWS else [],
        reference=lambda x: x.double() @ naive.dequantize(weights[0], K, torch.float64).T,
    )


def random_module(N: int, K: int, bits: int, dtype: torch.dtype) -> SimpleNamespace:
    """Return what ``prepack`` reads of a module, with random codes, centroids and outliers."""
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
    """Return a random packed weight on ``M`` rows of random inputs."""
    packed_weight = layer.prepack(random_module(N, K, bits, dtype))
    tensors = packed_weight.tensors()
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    reference = x.double() @ naive.dequantize(tensors, K, torch.float64).T
    size = N * K * bits // 8 + benchmark.bytes_of(tensors[3:7])  # codes and outliers
    return Contender(f"codebook{bits}", benchmark.calls_of(packed_weight, x), size, 2 * M * N * K, reference, MATH)
