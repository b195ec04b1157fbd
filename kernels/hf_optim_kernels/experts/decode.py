"""Products of a few pairs of token and expert: each program reads some rows of one expert's matrix once.

Two launches compute a layer. The second shares the experts of a token among programs; the last of them to arrive adds
their sums up in the order of the experts, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.splitk import is_last
from .activation import CONCATENATED, UNGATED, activate, gated


@triton.jit
def _up_kernel(
    x, experts, weight, bias, inner, semaphores, alpha, offset, limit, E, N, K, x_row, w_e, w_n, w_k,
    TOP_K: tl.constexpr, SEMAPHORES: tl.constexpr, LAYOUT: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute inner [pairs, N], float32: programs are (pair, tile of columns).

    The first program writes zeros into ``semaphores``, for the launch behind this one.
    """
    WIDTH: tl.constexpr = BLOCK_N if LAYOUT == UNGATED else BLOCK_N * 2
    pair, tile = tl.program_id(0), tl.program_id(1)
    if pair == 0 and tile == 0:
        tl.store(semaphores + tl.arange(0, SEMAPHORES), tl.zeros((SEMAPHORES,), tl.int32))
    expert = tl.load(experts + pair).to(tl.int64)
    if (expert >= 0) & (expert < E):
        wanted = tl.arange(0, WIDTH)
        column = tile * BLOCK_N + wanted
        row = column
        if LAYOUT == CONCATENATED:
            column = tile * BLOCK_N + wanted % BLOCK_N
            row = wanted // BLOCK_N * N + column
        elif LAYOUT != UNGATED:
            row = tile * WIDTH + wanted
            column = row // 2
        inside = column < N
        k = tl.arange(0, BLOCK_K)
        at = weight + expert * w_e + (row[:, None] * w_n + k[None, :] * w_k)
        own = x + (pair // TOP_K).to(tl.int64) * x_row + k
        acc = tl.zeros((WIDTH, BLOCK_K), tl.float32)
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if EVEN:
                part, w = tl.load(own + start), tl.load(at + start * w_k)
            else:
                left = k < K - start
                part = tl.load(own + start, mask=left, other=0.0)
                w = tl.load(at + start * w_k, mask=inside[:, None] & left[None, :], other=0.0)
            acc += w.to(tl.float32) * part.to(tl.float32)[None, :]
        total = tl.sum(acc, axis=1)
        if HAS_BIAS:
            rows = N if LAYOUT == UNGATED else N * 2
            total += tl.load(bias + expert * rows + row, mask=inside, other=0.0).to(tl.float32)
        if LAYOUT == UNGATED:
            y = activate(total, alpha, ACT)
        else:
            if LAYOUT == CONCATENATED:
                first, up = tl.split(tl.permute(tl.reshape(total, (2, BLOCK_N)), (1, 0)))
            else:
                first, up = tl.split(tl.reshape(total, (BLOCK_N, 2)))
            y = gated(first, up, alpha, offset, limit, ACT, CLAMP)
        columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        tl.store(inner + pair.to(tl.int64) * N + columns, y, mask=columns < N)


@triton.jit
def _down_kernel(
    inner, experts, weights, weight, bias, out, partial, semaphores, E, N, K, w_e, w_n, w_k,
    TOP_K: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute out [T, N]: programs are (tile of columns, token, part of its experts); partial [SPLIT, T, N] float32."""
    tile, token, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < N
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for choice in range(part, TOP_K, SPLIT):
        pair = token * TOP_K + choice
        expert = tl.load(experts + pair).to(tl.int64)
        if (expert >= 0) & (expert < E):
            share = tl.load(weights + pair).to(tl.float32)
            at = weight + expert * w_e + (column[:, None] * w_n + k[None, :] * w_k)
            own = inner + pair.to(tl.int64) * K + k
            for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                if EVEN:
                    x, w = tl.load(own + start), tl.load(at + start * w_k)
                else:
                    left = k < K - start
                    x = tl.load(own + start, mask=left, other=0.0)
                    w = tl.load(at + start * w_k, mask=inside[:, None] & left[None, :], other=0.0)
                acc += w.to(tl.float32) * (x * share)[None, :]
            if HAS_BIAS:
                total += share * tl.load(bias + expert * N + column, mask=inside, other=0.0).to(tl.float32)
    total += tl.sum(acc, axis=1)
    where = token.to(tl.int64) * N + column
    if SPLIT == 1:
        tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)
    else:
        size = tl.num_programs(1).to(tl.int64) * N
        tl.store(partial + part * size + where, total, mask=inside)
        if is_last(semaphores, token * tl.num_programs(0) + tile, SPLIT):
            total = tl.zeros((BLOCK_N,), tl.float32)
            for other in tl.static_range(SPLIT):
                total += tl.load(partial + other * size + where, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(out + where, total.to(out.dtype.element_ty), mask=inside)
