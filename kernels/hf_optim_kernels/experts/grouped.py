"""Grouped products: blocks of rows of one expert times tiles of its matrix.

``_grouped_kernel`` has one program per tile. Matrices are read through pointers, or through a tensor descriptor
(``DESCRIBED``: TMA, compute capability 9.0), whose tile has all of its columns of the gate before those of up.
``_persistent_kernel`` has as many programs as the device runs at a time, each with one tile after the other, and reads
the rows through a descriptor too.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from .activation import CHUNK, CONCATENATED, UNGATED, activate_tile, tile_rows


@triton.jit
def _described_tile(
    weight, expert, pid_n, start, LAYOUT: tl.constexpr, ACTIVATE: tl.constexpr, TRANSPOSED: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return a tile [BLOCK_K, WIDTH] of a matrix from its descriptor (``launch.describe``)."""
    if ACTIVATE and LAYOUT == CONCATENATED:
        if TRANSPOSED:
            tile = weight.load([expert, start, 0, pid_n * (WIDTH // 2)])
        else:
            tile = weight.load([expert * 2, pid_n * (WIDTH // 2), start])
    elif TRANSPOSED:
        tile = weight.load([expert, start, pid_n * WIDTH])
    else:
        tile = weight.load([expert, pid_n * WIDTH, start])
    return tl.reshape(tile, (BLOCK_K, WIDTH)) if TRANSPOSED else tl.reshape(tile, (WIDTH, BLOCK_K)).T


@triton.jit
def _store(
    acc, bias, out, expert, row, target, real, pid_n, alpha, offset, limit, N, LAYOUT: tl.constexpr,
    ACTIVATE: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, GATE_CHUNK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Store a tile of products at rows ``target``, with its bias and its activation."""
    if HAS_BIAS:
        w_row, column = tile_rows(pid_n * WIDTH + tl.arange(0, WIDTH), N, LAYOUT, ACTIVATE, GATE_CHUNK)
        rows = N * 2 if ACTIVATE and LAYOUT != UNGATED else N
        added = tl.load(bias + expert.to(tl.int64) * rows + w_row, mask=column < N, other=0.0)
        acc += added.to(tl.float32)[None, :]
    if ACTIVATE:
        acc = activate_tile(acc, alpha, offset, limit, LAYOUT, ACT, CLAMP, GATE_CHUNK, BLOCK_M, BLOCK_N)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = target.to(tl.int64)[:, None] * N + columns[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=real[:, None] & (columns < N)[None, :])


@triton.jit
def _multiply(
    x, weight, bias, out, order, expert, first, end, pid_n, alpha, offset, limit, N, K, x_row, w_e, w_n, w_k,
    TOP_K: tl.constexpr, BY_PAIR: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATE: tl.constexpr, ACT: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute rows ``first`` to ``end`` (at most BLOCK_M) of one expert for one tile of columns."""
    WIDTH: tl.constexpr = BLOCK_N * 2 if ACTIVATE and LAYOUT != UNGATED else BLOCK_N
    GATE_CHUNK: tl.constexpr = BLOCK_N if DESCRIBED else CHUNK
    row = first + tl.arange(0, BLOCK_M)
    real = row < end
    source = row
    target = row
    if TOP_K > 0 or BY_PAIR:
        pair = tl.load(order + row, mask=real, other=0)
        if TOP_K > 0:
            source = pair // TOP_K
        if BY_PAIR:
            target = pair
    k = tl.arange(0, BLOCK_K)
    x_at = x + source.to(tl.int64)[:, None] * x_row + k[None, :]
    acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
    if DESCRIBED:
        for start in range(0, K, BLOCK_K):
            if EVEN:
                a = tl.load(x_at, mask=real[:, None], other=0.0)
            else:
                a = tl.load(x_at, mask=real[:, None] & (k < K - start)[None, :], other=0.0)
            b = _described_tile(weight, expert, pid_n, start, LAYOUT, ACTIVATE, TRANSPOSED, WIDTH, BLOCK_K)
            if MATH == FP32:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            x_at += BLOCK_K
    else:
        w_row, column = tile_rows(pid_n * WIDTH + tl.arange(0, WIDTH), N, LAYOUT, ACTIVATE, GATE_CHUNK)
        inside = column < N
        w_at = weight + expert.to(tl.int64) * w_e + (w_row[None, :] * w_n + k[:, None] * w_k)
        for start in range(0, K, BLOCK_K):
            if EVEN:
                a = tl.load(x_at, mask=real[:, None], other=0.0)
                b = tl.load(w_at)
            else:
                left = k < K - start
                a = tl.load(x_at, mask=real[:, None] & left[None, :], other=0.0)
                b = tl.load(w_at, mask=inside[None, :] & left[:, None], other=0.0)
            if MATH == FP32:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision="ieee")
            x_at += BLOCK_K
            w_at += BLOCK_K * w_k
    _store(
        acc, bias, out, expert, row, target, real, pid_n, alpha, offset, limit, N, LAYOUT, ACTIVATE, ACT, CLAMP,
        HAS_BIAS, GATE_CHUNK, BLOCK_M, BLOCK_N, WIDTH,
    )  # fmt: skip


# The number of blocks differs from call to call.
@triton.jit(do_not_specialize=["ENTRIES"])
def _grouped_kernel(
    x, weight, bias, out, order, offsets, blocks, alpha, offset, limit, ENTRIES, N, K, x_row, w_e, w_n, w_k,
    TOP_K: tl.constexpr, BY_PAIR: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATE: tl.constexpr, ACT: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, DESCRIBED: tl.constexpr,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Multiply the rows of a route: out [rows, N], of x [T, K] (with TOP_K) or [rows, K].

    Args:
        weight: [E, rows, K] with strides ``w_e, w_n, w_k``, or its descriptor; with ACTIVATE and a gate it has 2 N
            rows, else N.
        order, offsets, blocks: of ``naive.Route``; a program takes ENTRIES as they come, GROUP of them together.
        BY_PAIR: rows of ``out`` are those of the pairs.
        EVEN: K and N are whole tiles.
        HALVES: a block with at most half of BLOCK_M rows is multiplied as half a tile.
    """
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * tiles)
    height = tl.minimum(ENTRIES - group * GROUP, GROUP)
    entry = group * GROUP + pid % (GROUP * tiles) % height
    pid_n = pid % (GROUP * tiles) // height
    expert = tl.load(blocks + entry * 2)
    if expert >= 0:
        first = tl.load(blocks + entry * 2 + 1)
        end = tl.minimum(tl.load(offsets + expert + 1), first + BLOCK_M)
        if HALVES and end - first <= BLOCK_M // 2:
            _multiply(
                x, weight, bias, out, order, expert, first, end, pid_n, alpha, offset, limit, N, K, x_row, w_e, w_n,
                w_k, TOP_K, BY_PAIR, LAYOUT, ACTIVATE, ACT, CLAMP, HAS_BIAS, EVEN, MATH, DESCRIBED, TRANSPOSED,
                BLOCK_M // 2, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        else:
            _multiply(
                x, weight, bias, out, order, expert, first, end, pid_n, alpha, offset, limit, N, K, x_row, w_e, w_n,
                w_k, TOP_K, BY_PAIR, LAYOUT, ACTIVATE, ACT, CLAMP, HAS_BIAS, EVEN, MATH, DESCRIBED, TRANSPOSED,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip


@triton.jit(do_not_specialize=["ENTRIES"])
def _persistent_kernel(
    x, weight, bias, out, order, offsets, blocks, alpha, offset, limit, ENTRIES, N, K,
    TOP_K: tl.constexpr, BY_PAIR: tl.constexpr, LAYOUT: tl.constexpr, ACTIVATE: tl.constexpr, ACT: tl.constexpr,
    CLAMP: tl.constexpr, HAS_BIAS: tl.constexpr, MATH: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr, STEP: tl.constexpr,
    PROGRAMS: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """Compute tiles PROGRAMS apart, as ``_grouped_kernel``, of rows ``x`` [rows, K] that stand in the route's order.

    ``x`` and ``weight`` are descriptors. Entries are counted STEP at a time.
    """
    WIDTH: tl.constexpr = BLOCK_N * 2 if ACTIVATE and LAYOUT != UNGATED else BLOCK_N
    used = tl.zeros((STEP,), tl.int32)
    for start in range(0, ENTRIES, STEP):
        entries = start + tl.arange(0, STEP)
        used += (tl.load(blocks + entries * 2, mask=entries < ENTRIES, other=-1) >= 0).to(tl.int32)
    count = tl.sum(used)
    tiles = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), count * tiles, PROGRAMS, flatten=FLATTEN):
        group = tile // (GROUP * tiles)
        height = tl.minimum(count - group * GROUP, GROUP)
        entry = group * GROUP + tile % (GROUP * tiles) % height
        pid_n = tile % (GROUP * tiles) // height
        expert = tl.load(blocks + entry * 2)
        first = tl.load(blocks + entry * 2 + 1)
        acc = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for start in range(0, K, BLOCK_K):
            a = x.load([first, start])
            b = _described_tile(weight, expert, pid_n, start, LAYOUT, ACTIVATE, TRANSPOSED, WIDTH, BLOCK_K)
            if MATH == FP32:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc)
        end = tl.minimum(tl.load(offsets + expert + 1), first + BLOCK_M)
        row = first + tl.arange(0, BLOCK_M)
        real = row < end
        target = row
        if BY_PAIR:
            target = tl.load(order + row, mask=real, other=0)
        _store(
            acc, bias, out, expert, row, target, real, pid_n, alpha, offset, limit, N, LAYOUT, ACTIVATE, ACT, CLAMP,
            HAS_BIAS, BLOCK_N, BLOCK_M, BLOCK_N, WIDTH,
        )  # fmt: skip


@triton.jit
def _combine_kernel(
    rows, experts, weights, out, E, N, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    """Add up the rows [T TOP_K, N] of each token, times their weights: out [T, N]."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_N,), tl.float32)
    for choice in tl.static_range(TOP_K):
        pair = token * TOP_K + choice
        expert = tl.load(experts + pair)
        # A row that no expert has computed may hold anything.
        end = tl.where((expert >= 0) & (expert < E), N, 0)
        row = tl.load(rows + pair * N + column, mask=column < end, other=0.0)
        acc += row.to(tl.float32) * tl.load(weights + pair).to(tl.float32)
    tl.store(out + token * N + column, acc.to(out.dtype.element_ty), mask=column < N)
