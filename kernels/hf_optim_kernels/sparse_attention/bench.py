"""Contenders of ``hf-optim bench`` for block-sparse attention: a causal window.

A "layer of ``N`` outputs and ``K`` inputs" is attention of ``N / 64`` heads of 64 here, whose tokens see themselves and
``K - 1`` of the ``M`` before it. ``examples/gpu/sparse_attention.py`` times other patterns, and the backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common import benchmark
from ..common.benchmark import Contender
from ..common.tuner import Tunable, with_config
from . import op
from .naive import Layout

BLOCK, HEAD = 64, 64
MATH = "bfloat16"


def contenders(N: int, K: int, M: int, dtype: torch.dtype = torch.bfloat16) -> list[Contender]:
    """Return the kernels, and PyTorch's causal attention without a window (``dense``)."""
    device, size = benchmark.device(), math.gcd(N, HEAD)
    heads, scale = N // size, size**-0.5
    held = benchmark.copies_of(tuple(torch.randn(1, heads, M, size, device=device).to(dtype) for _ in range(3)))
    layout = causal_window(heads, M, K, device)
    keys = sum(min(K, token + 1) for token in range(M))
    flops, moved = 4 * heads * size * keys, 4 * benchmark.bytes_of((held[0][0],))
    at = torch.arange(M, device=device)
    seen = (at <= at[:, None]) & (at > at[:, None] - K)
    query, key, value = held[0]
    by_head = [_exact(query[0, h], key[0, h], value[0, h], seen, scale) for h in range(heads)]
    reference = _rows(torch.stack(by_head)[None])
    ours = [partial(_sparse, q, k, v, layout, scale) for q, k, v in held]
    dense = [partial(_causal, q, k, v) for q, k, v in held]
    whole = reference if K >= M else None
    return [
        Contender("sparse_attention", ours, moved, flops, reference, MATH),
        Contender(
            "scaled_dot_product_attention", dense, moved, 2 * heads * size * M * (M + 1), whole, MATH, dense=True
        ),
    ]


def tunables(N: int, K: int, dtype: torch.dtype = torch.bfloat16) -> list[Tunable]:
    """Return the forward of a causal window, and its gradients: tiles by block and head, for all layouts."""
    from .tiles import FORWARD, KEYS, QUERIES  # needs Triton, which timing on a CPU does not

    size = math.gcd(N, HEAD)
    return [_tunable(direction, N // size, size, K, dtype) for direction in (FORWARD, QUERIES, KEYS)]


def _tunable(direction: str, heads: int, size: int, window: int, dtype: torch.dtype) -> Tunable:
    from .tiles import FORWARD, QUERIES, guessed, padded

    name = f"sparse_attention_{direction}"

    def run(x: Tensor, layout: Layout) -> Tensor:
        query, key, value = (one[None] for one in x)
        if direction == FORWARD:
            return _sparse(query, key, value, layout, size**-0.5)
        query, key, value = held = tuple(one.detach().requires_grad_() for one in (query, key, value))
        with torch.enable_grad():
            out = op.sparse_attention(query, key, value, layout, size**-0.5)[0]
        grads = torch.autograd.grad(out, held, torch.ones_like(out))
        return torch.stack(grads[:1] if direction == QUERIES else grads[1:])

    def calls(x: Tensor, config: dict[str, int]) -> list[Callable[[], Tensor]]:
        layout = causal_window(heads, x.shape[2], window, x.device)
        return [with_config(name, config, partial(run, one, layout)) for (one,) in benchmark.copies_of((x,))]

    def reference(x: Tensor) -> Tensor:
        at = torch.arange(x.shape[2], device=x.device)
        seen = (at <= at[:, None]) & (at > at[:, None] - window)
        held = [one[None].double().requires_grad_() for one in x]
        with torch.enable_grad():
            scores = (held[0] @ held[1].mT * size**-0.5).masked_fill(~seen, float("-inf"))
            out = scores.softmax(-1) @ held[2]
            grads = torch.autograd.grad(out.sum(), held) if direction != FORWARD else ()
        if direction == FORWARD:
            return _rows(out.detach())
        return torch.stack(grads[:1] if direction == QUERIES else grads[1:])

    def candidates(rows: int) -> list[dict[str, int]]:
        first = guessed(direction, BLOCK, padded(size), dtype)._asdict()
        every = [
            {"step": step, "warps": warps, "stages": stages, "registers": registers}
            for step in (16, 32, 64) for warps in (4, 8) for stages in (1, 2, 3, 4) for registers in (0, 128)
        ]  # fmt: skip
        return [first, *(each for each in every if each != first)]

    return Tunable(
        op=name,
        shape=(BLOCK, padded(size), padded(size)),
        dtype=dtype,
        inputs=lambda rows: torch.randn(3, heads, rows, size, device=benchmark.device()).to(dtype),
        calls=calls,
        candidates=candidates,
        reference=reference,
        any_rows=True,
        largest_error=1e-2,
    )


def causal_window(heads: int, tokens: int, window: int, device: torch.device) -> Layout:
    """Return the layout of queries that see themselves and the ``window - 1`` tokens before them."""
    blocks = -(-tokens // BLOCK)
    number = torch.arange(blocks)
    first = ((number * BLOCK - window + 1) // BLOCK).clamp(min=0)
    counts = number - first + 1
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    rows = torch.repeat_interleave(number, counts)
    columns = torch.arange(len(rows)) - (starts[:-1] - first)[rows]
    # A mask for each distance of blocks; those that show all are whole.
    inside = torch.arange(BLOCK)
    distance = torch.arange(int(counts.max()))[:, None, None] * BLOCK + inside[:, None] - inside
    seen = (distance >= 0) & (distance < window)
    weights = torch.ones((), dtype=torch.int64) << torch.arange(32)
    bits = (seen.unflatten(2, (-1, 32)).long() * weights).sum(-1)
    masks = (rows - columns).masked_fill(seen.all(-1).all(-1)[rows - columns], -1)
    order = torch.argsort(columns, stable=True)
    key_starts = torch.cat([counts.new_zeros(1), torch.bincount(columns, minlength=blocks).cumsum(0)])
    lists = (starts[None], columns, masks, bits, key_starts[None], rows[order], masks[order])
    sent = [each.to(torch.int32).contiguous().to(device) for each in (torch.zeros(heads), *lists)]
    return Layout(BLOCK, *sent)


def _exact(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Return the attention of one head in float64."""
    scores = (query.double() @ key.double().mT * scale).masked_fill(~seen, float("-inf"))
    return scores.softmax(-1) @ value.double()


def _sparse(query: Tensor, key: Tensor, value: Tensor, layout: Layout, scale: float) -> Tensor:
    return _rows(op.sparse_attention(query, key, value, layout, scale)[0])


def _causal(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _rows(F.scaled_dot_product_attention(query, key, value, is_causal=True))


def _rows(out: Tensor) -> Tensor:
    return out.transpose(1, 2).flatten(2)[0]
