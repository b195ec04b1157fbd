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
from ..common.tuner import Tunable, variations
from . import naive, op
from .naive import Layer, Rows

BLOCK, WIDENING = 16, 4


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return the layer that ``contenders`` times: the tiles of its launches."""
    from . import launch

    made = random_layers(N, K, dtype)
    return [
        Tunable(
            op=launch.name_of(made[0]),
            shape=launch.shape_of(made[0]),
            dtype=dtype,
            inputs=lambda rows: torch.randn(rows, K, device=benchmark.device()).to(dtype),
            calls=lambda x, config: [partial(launch.sparse_ffn, x, one, launch.Tiles(**config)) for one in made],
            candidates=lambda rows: variations(
                launch.default_tiles(made[0])._asdict(),
                r=(1, 2, 4), r_k=(512, 1024, 2048), b=(1, 2, 4), b_r=(64, 128), b_k=(256, 512, 1024), b_warps=(4, 8),
                d=(64, 128, 256), d_b=(16, 32, 64), split=(1, 2, 4, 8), stages=(2, 3, 4), early=(True,),
            ),
            reference=lambda x: naive.sparse_ffn(x, made[0]).double(),
        )
    ]  # fmt: skip


def random_layers(N: int, K: int, dtype: torch.dtype) -> list[Layer]:
    """Return a random layer of ``K`` inputs and ``N`` outputs, and copies of it, larger than the L2 cache together."""
    units, rank = WIDENING * K, max(1, K // BLOCK)
    draw = lambda *size: (torch.randn(*size, device=benchmark.device()) / size[-1] ** 0.5).to(dtype)  # noqa: E731
    held = benchmark.copies_of((draw(rank, K), draw(units, rank), draw(units, K), draw(units, N)))
    return [Layer(a, b, None, Rows(up), None, Rows(down), None, BLOCK, "relu") for a, b, up, down in held]


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernels (or, on a CPU, what is done there), and the dense layer (``dense``)."""
    made = random_layers(N, K, dtype)
    units, rank = len(made[0].second), len(made[0].first)
    x = torch.randn(M, K, device=benchmark.device()).to(dtype)
    # A wrong choice of two nearly equal logits is none: the specification has the dtype of the layer.
    reference = naive.sparse_ffn(x, made[0])
    chosen = naive.choose(x, made[0])[0].unique().numel()
    size = chosen * (K + N) * x.element_size() + benchmark.bytes_of((made[0].first, made[0].second))
    flops = 2 * M * (units // BLOCK * (K + N) + rank * (K + units))
    flat = [(one.up.data, one.down.data.t().contiguous()) for one in made]
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
