"""The layers of ``experts.py``: shapes of models, random weights and inputs of them, and what bounds their times."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

from hf_optim_kernels.experts import naive
from hf_optim_kernels.experts.naive import Gate, Weights


class Shape(NamedTuple):
    """A mixture layer: hidden size, inner size, experts, choices of a token, and what is between its matrices."""

    d: int
    inner: int
    experts: int
    top_k: int
    gate: Gate = Gate()
    bias: bool = False
    transposed: bool = False


CLAMPED = Gate(naive.INTERLEAVED, naive.SILU, 1.702, 1.0, 7.0)
SHAPES = {
    "qwen3-30b-a3b": Shape(2048, 768, 128, 8),
    "mixtral": Shape(4096, 14336, 8, 2),
    "olmoe": Shape(2048, 1024, 64, 8),
    "gpt-oss-20b": Shape(2880, 2880, 32, 4, CLAMPED, True, True),
    "deepseek-v2-lite": Shape(2048, 1408, 64, 6),
}
TUNED = ("qwen3-30b-a3b", "mixtral")
TOKENS = (1, 8, 64, 512, 4096)


@functools.lru_cache(maxsize=2)
def layers(name, count=2):
    """Random experts of a shape, ``count`` times."""
    shape = SHAPES[name]
    random = torch.Generator("cuda").manual_seed(0)
    draw = lambda *size: torch.randn(size, device="cuda", dtype=torch.bfloat16, generator=random) / size[-1] ** 0.5  # noqa: E731
    found = []
    for _ in range(count):
        rows = shape.inner * (1 if shape.gate.layout == naive.UNGATED else 2)
        up, down = draw(shape.experts, rows, shape.d), draw(shape.experts, shape.d, shape.inner)
        biases = (draw(shape.experts, rows), draw(shape.experts, shape.d)) if shape.bias else (None, None)
        if shape.transposed:
            up, down = up.transpose(1, 2).contiguous(), down.transpose(1, 2).contiguous()
        found.append(Weights(up, down, *biases, shape.transposed))
    return found


def batch(name, tokens, seed=0):
    """Random hidden states, choices and weights."""
    shape = SHAPES[name]
    random = torch.Generator("cuda").manual_seed(seed)
    hidden = torch.randn(tokens, shape.d, device="cuda", generator=random).to(torch.bfloat16)
    scores, chosen = torch.rand(tokens, shape.experts, device="cuda", generator=random).topk(shape.top_k, dim=1)
    return hidden, chosen, (scores / scores.sum(1, keepdim=True)).to(torch.bfloat16)


def situations(name, tokens):
    """Layers with batches: as many that no call finds its weights in the L2 cache."""
    count = 8 if tokens == 1 else 4
    return [(layers(name)[i % 2], *batch(name, tokens, i)) for i in range(count)]


def floor(name, tokens, bandwidth, rate):
    """Microseconds to read the experts that are hit, or to multiply."""
    shape = SHAPES[name]
    hit = len(batch(name, tokens)[1].unique())
    matrices = 3 if shape.gate.layout else 2
    size = matrices * shape.d * shape.inner
    return max(hit * size * 2 / bandwidth, 2 * tokens * shape.top_k * size / rate)
