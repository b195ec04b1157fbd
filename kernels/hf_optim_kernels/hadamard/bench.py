"""Contenders of ``hf-optim bench`` for Hadamard transforms of ``M`` rows of ``N`` channels.

The blocks are the largest powers of two that divide ``N``; ``K`` is not used. ``dense`` multiplies by the matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable, variations, with_config
from . import naive, op


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the transform, the product with its matrix (``dense``), and the transform that quantizes its rows."""
    block = N & -N
    x = torch.randn(M, N, device=benchmark.device()).to(dtype)
    held = benchmark.copies_of((x,))
    matrix = (naive.matrix(block) * block**-0.5).to(x)
    moved, flops = 2 * x.numel() * x.element_size(), x.numel() * block.bit_length()
    reference = naive.hadamard(held[0][0], block)
    codes = x.numel() * (x.element_size() + 1)
    return [
        Contender("hadamard", [partial(op.hadamard, one, block) for (one,) in held], moved, flops, reference),
        Contender(
            "hadamard_int8",
            [partial(decoded, one, block) for (one,) in held],
            codes,
            flops,
            quantized(held[0][0], block),
        ),
        Contender("dense", [partial(dense, one, matrix) for (one,) in held], moved, 2 * x.numel() * block, dense=True),
    ]


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return the transform of rows of ``N`` channels: the channels of a program, and of a warp."""
    from . import launch

    block = N & -N

    def calls(x: Tensor, config: dict[str, int]) -> list[Callable[[], Tensor]]:
        run = [partial(op.hadamard, one, block) for (one,) in benchmark.copies_of((x,))]
        return [with_config(launch.OP, config, call) for call in run]

    return [
        Tunable(
            op=launch.OP,
            shape=(N, block),
            dtype=dtype,
            inputs=lambda rows: torch.randn(rows, N, device=benchmark.device()).to(dtype),
            calls=calls,
            candidates=lambda rows: variations(
                launch.DEFAULT, tile=(1024, 2048, 8192, 16384), per_warp=(128, 256, 1024)
            ),
            reference=lambda x: naive.hadamard(x.double(), block),
            any_rows=True,
        )
    ]


def dense(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the transform as a product."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def decoded(x: Tensor, block: int) -> Tensor:
    """Return the codes of the operator, int8."""
    return op.hadamard_int8(x, block)[0]


def quantized(x: Tensor, block: int) -> Tensor:
    """Return the codes of the specification, int8."""
    return naive.hadamard_int8(x, block)[0]
