"""Contenders and tunables for the product of one row with a dense weight."""

from __future__ import annotations

from functools import partial

import torch

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable
from . import naive, op


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return a random layer of shape [N, K]; its product with more rows than one is the library's."""
    from . import launch

    weight = torch.randn(N, K, device=benchmark.device(), dtype=dtype)
    weights = [copy for (copy,) in benchmark.copies_of((weight,))]
    return [
        Tunable(
            op=launch.OP,
            shape=(N, K),
            dtype=dtype,
            inputs=lambda rows: torch.randn(K, device=weight.device, dtype=dtype),
            calls=lambda x, config: [partial(launch.dense_row, x, each, None, config) for each in weights],
            candidates=lambda rows: launch.candidates(K, 1, N) if rows == 1 else [],
            reference=lambda x: naive.dense_row(x.double(), weight.double(), None),
        )
    ]


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the product of one row, and the library's; of more rows, the library's alone."""
    x = torch.randn(M, K, device=benchmark.device(), dtype=dtype)
    weight = torch.randn(N, K, device=benchmark.device(), dtype=dtype)
    dense = benchmark.dense_contender(x, weight)
    if M != 1 or op.unsupported(weight, None) is not None:
        return [dense]
    calls = [partial(op.dense_row, x, *copy, None) for copy in benchmark.copies_of((weight,))]
    size = benchmark.bytes_of((weight,))
    return [Contender("dense_row", calls, size, 2 * N * K, dense.reference), dense]
