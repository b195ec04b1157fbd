"""Contenders of ``hf-optim bench`` for a mixture layer with dense weights.

A "layer of ``N`` outputs and ``K`` inputs" is a mixture of hidden size ``N`` here, whose experts have ``K`` inner
features; ``M`` tokens choose 2 of 8 of them. ``examples/gpu/experts.py`` times the shapes of models.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Config, Tunable, variations, with_config
from . import naive, op
from .naive import Gate, Weights, block_rows

EXPERTS, TOP_K = 8, 2
MATH = "bfloat16"


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return the mixture that ``contenders`` times: the tiles of its two products, by the rows of a block."""
    held = random_weights(N, K, dtype)
    return [_tunable(part, N, K, dtype, held) for part in ("up", "down")]


def _tunable(part: str, N: int, K: int, dtype: torch.dtype, held: list[Weights]) -> Tunable:
    from . import launch

    name = f"experts-{part}"

    def block_of(rows: int) -> int:
        return 0 if launch.decodes(rows, TOP_K, EXPERTS) else block_rows(rows * TOP_K, EXPERTS)

    def route_of(hidden: Tensor) -> tuple[Tensor, Tensor]:
        drawn = torch.rand(len(hidden), EXPERTS, device=hidden.device, generator=_seeded(hidden.device))
        return drawn.topk(TOP_K, dim=1).indices, torch.full((len(hidden), TOP_K), 0.5, device=hidden.device)

    def calls(hidden: Tensor, config: Config) -> list[Callable[[], Tensor]]:
        route = route_of(hidden)
        return [with_config(name, config, partial(op.mixture, hidden, *route, one, Gate())) for one in held]

    def reference(hidden: Tensor) -> Tensor:
        chosen, weights = route_of(hidden)
        wide = Weights(held[0].up.double(), held[0].down.double(), None, None, False)
        return naive.mixture(hidden.double(), chosen, weights.double(), wide, Gate())

    def candidates(rows: int) -> list[Config]:
        first = launch.plan(rows, TOP_K, EXPERTS, K, N, False, True)
        tiles = (first.up if part == "up" else first.down)._asdict()
        if first.block == 0:
            return variations(tiles, n=(8, 16, 32, 64), k=(64, 128, 256, 512), warps=(2, 4, 8), stages=(2, 3, 4, 5))
        return variations(
            tiles, n=(64, 128, 256), k=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4, 5), group=(1, 4, 8, 16),
            halves=(True, False), described=(True, False), persistent=(True, False),
        )  # fmt: skip

    return Tunable(
        op=name,
        shape=(K, N) if part == "up" else (N, K),
        dtype=dtype,
        inputs=lambda rows: torch.randn(rows, N, device=benchmark.device()).to(dtype),
        calls=calls,
        candidates=candidates,
        reference=reference,
        entry=lambda rows: max(1, block_of(rows)),
        largest_error=1e-2,
    )


def _seeded(device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)


def random_weights(N: int, K: int, dtype: torch.dtype) -> list[Weights]:
    """Return the matrices of a mixture, and copies of them, larger than the L2 cache together."""
    draw = lambda *size: (torch.randn(*size, device=benchmark.device()) / size[-1] ** 0.5).to(dtype)  # noqa: E731
    held = benchmark.copies_of((draw(EXPERTS, 2 * K, N), draw(EXPERTS, N, K)))
    return [Weights(up, down, None, None, False) for up, down in held]


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernels, and PyTorch's grouped product between a sort and a sum (``dense``)."""
    device, gate = benchmark.device(), Gate()
    given = random_weights(N, K, dtype)
    hidden, weights = torch.randn(M, N, device=device).to(dtype), torch.rand(M, TOP_K, device=device)
    chosen = torch.rand(M, EXPERTS, device=device).topk(TOP_K, dim=1).indices
    hit = len(chosen.unique())
    size, flops = hit * 3 * N * K * hidden.element_size(), 2 * M * TOP_K * 3 * N * K
    wide = Weights(given[0].up.double(), given[0].down.double(), None, None, False)
    reference = naive.mixture(hidden.double(), chosen, weights.double(), wide, gate)
    ours = [partial(op.mixture, hidden, chosen, weights, one, gate) for one in given]
    torchs = [partial(grouped, hidden, chosen, weights, one, gate) for one in given]
    return [
        Contender("experts", ours, size, flops, reference, MATH),
        Contender("grouped_mm", torchs, size, flops, reference, MATH, dense=True),
    ]


def grouped(hidden: Tensor, chosen: Tensor, weights: Tensor, given: Weights, gate: Gate) -> Tensor:
    """Return the layer by PyTorch's grouped product, with the pairs sorted and summed by PyTorch."""
    ordered, order = torch.sort(chosen.reshape(-1))
    numbers = torch.arange(given.up.shape[0], device=hidden.device)
    ends = torch.searchsorted(ordered, numbers, right=True).to(torch.int32)
    up, down = (matrix.transpose(1, 2) for matrix in given.matrices)
    inner = naive.apply_gate(torch.nn.functional.grouped_mm(hidden[order // chosen.shape[1]], up, offs=ends), gate)
    rows = torch.nn.functional.grouped_mm(inner, down, offs=ends)
    each = torch.empty_like(rows).index_copy_(0, order, rows).view(*chosen.shape, -1)
    return (each * weights[..., None]).sum(1).to(hidden.dtype)
