"""Contenders of ``hf-optim bench`` for a mixture layer with dense weights.

A "layer of ``N`` outputs and ``K`` inputs" is a mixture of hidden size ``N`` here, whose experts have ``K`` inner
features; ``M`` tokens choose 2 of 8 of them. ``examples/gpu/experts.py`` times the shapes of models.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from . import naive, op
from .naive import Gate, Weights

EXPERTS, TOP_K = 8, 2
MATH = "bfloat16"


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernels, and PyTorch's grouped product between a sort and a sum (``dense``)."""
    device, gate = benchmark.device(), Gate()
    draw = lambda *size: (torch.randn(*size, device=device) / size[-1] ** 0.5).to(dtype)  # noqa: E731
    held = benchmark.copies_of((draw(EXPERTS, 2 * K, N), draw(EXPERTS, N, K)))
    hidden, weights = torch.randn(M, N, device=device).to(dtype), torch.rand(M, TOP_K, device=device)
    chosen = torch.rand(M, EXPERTS, device=device).topk(TOP_K, dim=1).indices
    given = [Weights(up, down, None, None, False) for up, down in held]
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
