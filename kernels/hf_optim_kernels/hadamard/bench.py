"""Contenders of ``hf-optim bench`` for Hadamard transforms of ``M`` rows of ``N`` channels.

The blocks are the largest powers of two that divide ``N``; ``K`` is not used. ``dense`` multiplies by the matrix.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
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


def dense(x: Tensor, matrix: Tensor) -> Tensor:
    """Return the transform as a product."""
    return (x.unflatten(-1, (-1, len(matrix))) @ matrix).flatten(-2)


def decoded(x: Tensor, block: int) -> Tensor:
    """Return the codes of the operator, int8."""
    return op.hadamard_int8(x, block)[0]


def quantized(x: Tensor, block: int) -> Tensor:
    """Return the codes of the specification, int8."""
    return naive.hadamard_int8(x, block)[0]
