"""Contenders of ``hf-optim bench`` for a sparse feed-forward layer.

A "layer of ``N`` outputs and ``K`` inputs" is a ReLU layer of ``K`` inputs, ``4 K`` units in blocks of 16 and ``N``
outputs here. ``examples/gpu/sparse_ffn.py`` times other blocks, and codes.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..common import benchmark
from ..common.benchmark import Contender
from . import naive, op
from .naive import Layer, Rows

BLOCK, WIDENING = 16, 4


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernels (or, on a CPU, what is done there), and the dense layer (``dense``)."""
    units, rank = WIDENING * K, max(1, K // BLOCK)
    draw = lambda *size: (torch.randn(*size, device=benchmark.device()) / size[-1] ** 0.5).to(dtype)  # noqa: E731
    held = benchmark.copies_of((draw(rank, K), draw(units, rank), draw(units, K), draw(units, N)))
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    made = [Layer(a, b, None, Rows(up), None, Rows(down), None, BLOCK, "relu") for a, b, up, down in held]
    # A wrong choice of two nearly equal logits is none: the specification has the dtype of the layer.
    reference = naive.sparse_ffn(x, made[0])
    chosen = naive.choose(x, made[0])[0].unique().numel()
    size = chosen * (K + N) * x.element_size() + benchmark.bytes_of(held[0][:2])
    flops = 2 * M * (units // BLOCK * (K + N) + rank * (K + units))
    flat = [(up, down.t().contiguous()) for _, _, up, down in held]
    return [
        Contender("sparse_ffn", [partial(op.sparse_ffn, x, one) for one in made], size, flops, reference),
        Contender(
            "dense", [partial(dense, x, up, down) for up, down in flat], benchmark.bytes_of(flat[0]),
            2 * M * units * (K + N), dense=True,
        ),
    ]  # fmt: skip


def dense(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return the layer with all units, by PyTorch; ``down`` is ``[out, units]``."""
    return F.linear(F.relu(F.linear(x, up)), down)
