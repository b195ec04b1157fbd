"""The Triton kernels of the packed experts (specified by ``naive``; the product of a k-tile is that of ``wna16``).

``_pairs_kernel`` computes tiles [BLOCK_M pairs of one expert, BLOCK_N rows of its matrix]. Its blocks of pairs come
from a list (``experts.naive.Route``), or, for a few tokens, every pair is a block of its own: nothing is sorted then.
With ``GATE``, rows of the gate and of the other half alternate in a tile, so that one program has both and writes
``silu(gate) * up``.

``_down_kernel`` is the second product for a few tokens: the programs of a tile of the output are the pairs of a token
(and shares of their columns), and the last of them adds up all of their sums, weighted, in a fixed order.

``_combine_kernel`` adds up the outputs of the pairs of each token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.splitk import store_part, sum_parts, tile_parts
from ..wna16.float4_kernel import accumulate as _accumulate_floats
from ..wna16.kernel import _add_tile, _columns


@triton.jit
def _accumulate_integers(
    acc, x, words, scale, zero, rows, cols, start, stop, M, N, K, stride_x, stride_tile,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` [BLOCK_N, BLOCK_M] plus the products of every ``STEP``-th k-tile from ``start`` to ``stop``."""
    tile = words + cols[:, None] * SLICE + tl.arange(0, SLICE)[None, :]
    TILE_COLUMNS: tl.constexpr = SLICE * (16 // WIDTH)
    # The scales of a k-tile are fetched while the one before it is multiplied: nothing else hides their latency.
    s0, s1, s2, s3 = _columns(scale, start * TILE_COLUMNS, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    if HAS_ZERO:
        z0, z1, z2, z3 = _columns(zero, start * TILE_COLUMNS, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
    for k_tile in range(start, stop, STEP):
        found = tl.load(tile + k_tile * stride_tile)
        first = k_tile * TILE_COLUMNS
        following = first + STEP * TILE_COLUMNS
        n0, n1, n2, n3 = _columns(scale, following, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
        if HAS_ZERO:
            m0, m1, m2, m3 = _columns(zero, following, cols, N, K, SLICE, GROUP, PER_SCALE, WIDTH)
            zeros = (z0, z1, z2, z3)
        else:
            zeros = (s0, s0, s0, s0)  # not read
        acc = _add_tile(acc, found, x, (s0, s1, s2, s3), zeros, rows, first, M, K, stride_x,
                        SLICE, PER_SCALE, HAS_ZERO, WIDTH, MATH, ASM)  # fmt: skip
        s0, s1, s2, s3 = n0, n1, n2, n3
        if HAS_ZERO:
            z0, z1, z2, z3 = m0, m1, m2, m3
    return acc


@triton.jit
def _accumulate(
    acc, x, words, scale, zero, rows, cols, start, stop, M, N, K, stride_x, stride_tile,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, STEP: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Return ``acc`` plus products of either kind of numbers; of NVFP4 (``FORMAT`` 1) ``zero`` [N] are divisors."""
    if FORMAT > 0:
        acc = _accumulate_floats(acc, x, words, scale, zero, rows, cols, start, stop, M, N, K, stride_x, stride_tile,
                                 GROUP, FORMAT, MATH, ASM, STEP)  # fmt: skip
    else:
        acc = _accumulate_integers(acc, x, words, scale, zero, rows, cols, start, stop, M, N, K, stride_x, stride_tile,
                                   SLICE, GROUP, PER_SCALE, HAS_ZERO, WIDTH, MATH, ASM, STEP)  # fmt: skip
    return acc


@triton.jit
def _store_rows(acc, out, slots, valid, pid_n, N, GATE: tl.constexpr):
    """Store a tile ``acc`` [BLOCK_N, BLOCK_M] in the rows ``slots`` of out; with ``GATE`` ``silu(gate) * up`` of it."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if GATE:
        halves = tl.permute(tl.reshape(acc, (BLOCK_N // 2, 2, BLOCK_M)), (0, 2, 1))
        gate, up = tl.split(halves)
        value = gate / (1.0 + tl.exp(-gate)) * up
        wanted = pid_n * (BLOCK_N // 2) + tl.arange(0, BLOCK_N // 2)
        width = N // 2
    else:
        value = acc
        wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
        width = N
    at = out + slots.to(tl.int64)[None, :] * width + wanted[:, None]
    tl.store(at, value.to(out.dtype.element_ty), mask=valid[None, :] & (wanted < width)[:, None])


@triton.jit(do_not_specialize=["M"])
def _pairs_kernel(
    x, packed, scale, zero, out, partial, semaphores, experts, order, offsets, blocks, M, N, K, E, stride_x,
    stride_expert, stride_tile, stride_scale, stride_zero,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr,
    EACH: tl.constexpr, GATE: tl.constexpr, LISTED: tl.constexpr, FROM_SLOT: tl.constexpr, TO_SLOT: tl.constexpr,
    FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute tiles of out [S, N], or [S, N / 2] with ``GATE``.

    A *slot* is the place of a pair among all of them, sorted by expert; without a list (``LISTED``), of the pairs as
    they are. x [M, K] has a row for every ``EACH`` pairs, or one for each slot (``FROM_SLOT``); out has a row for each
    pair, or one for each slot (``TO_SLOT``). packed int16 [E, k-tiles, N, SLICE], scale and zero [E, groups, N]
    (of NVFP4, zero [E, N] are divisors), experts int64 [S] by pair; order [S], offsets [E + 1] and blocks [blocks, 2]
    are those of ``experts.naive.Route``.
    """
    pid_n, pid_b, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    lanes = tl.arange(0, BLOCK_M)
    expert = tl.load(blocks + pid_b * 2).to(tl.int64) if LISTED else tl.load(experts + pid_b).to(tl.int64)
    if (expert >= 0) & (expert < E):
        if LISTED:
            slots = tl.load(blocks + pid_b * 2 + 1) + lanes
            valid = slots < tl.load(offsets + expert + 1)
            pairs = tl.load(order + slots, mask=valid, other=0)
        else:
            slots = pid_b + lanes
            valid = lanes < 1
            pairs = slots
        rows = tl.where(valid, slots if FROM_SLOT else pairs // EACH, M)
        lane = tl.arange(0, BLOCK_N)
        if GATE:
            half = N // 2
            cols = tl.minimum(pid_n * (BLOCK_N // 2) + lane // 2, half - 1) + (lane % 2) * half
        else:
            cols = tl.minimum(pid_n * BLOCK_N + lane, N - 1)
        acc = _accumulate(
            tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x, packed + expert * stride_expert, scale + expert * stride_scale,
            zero + expert * stride_zero, rows, cols, pid_s, tl.cdiv(K, SLICE * (16 // WIDTH)), M, N, K, stride_x,
            stride_tile, SLICE, GROUP, PER_SCALE, HAS_ZERO, WIDTH, MATH, ASM, SPLIT, FORMAT,
        )  # fmt: skip
        places = slots if TO_SLOT else pairs
        if SPLIT > 1:
            tile = pid_b * tl.num_programs(0) + pid_n
            parts = tile_parts(partial, tile, BLOCK_M, BLOCK_N, SPLIT)
            if store_part(acc, parts, pid_s, semaphores, tile, SPLIT):
                _store_rows(sum_parts(acc, parts, semaphores, tile, SPLIT), out, places, valid, pid_n, N, GATE)
        else:
            _store_rows(acc, out, places, valid, pid_n, N, GATE)


@triton.jit
def _down_kernel(
    x, packed, scale, zero, out, partial, semaphores, experts, weights, N, K, E, stride_expert, stride_tile,
    stride_scale, stride_zero,
    SLICE: tl.constexpr, GROUP: tl.constexpr, PER_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr, WIDTH: tl.constexpr,
    MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TOP_K: tl.constexpr,
    SPLIT: tl.constexpr, FORMAT: tl.constexpr,
):  # fmt: skip
    """Compute out [T, N], the weighted sum over the pairs of each token: x [T TOP_K, K] by pair.

    Programs are (tiles of N, tokens, pairs times ``SPLIT`` shares of the columns); partial float32
    [T, tiles, TOP_K SPLIT, BLOCK_N].
    """
    pid_n, pid_t, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    SHARES: tl.constexpr = TOP_K * SPLIT
    pair = pid_t * TOP_K + pid_s // SPLIT
    found = tl.load(experts + pair).to(tl.int64)
    computed = (found >= 0) & (found < E)
    expert = tl.where(computed, found, 0)
    stop = tl.where(computed, tl.cdiv(K, SLICE * (16 // WIDTH)), 0)
    lanes = tl.arange(0, BLOCK_M)
    rows = tl.where(lanes < 1, pair + lanes, 1 << 30)
    cols = tl.minimum(pid_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    acc = _accumulate(
        tl.zeros([BLOCK_N, BLOCK_M], tl.float32), x, packed + expert * stride_expert, scale + expert * stride_scale,
        zero + expert * stride_zero, rows, cols, pid_s % SPLIT, stop, 1 << 30, N, K, K, stride_tile,
        SLICE, GROUP, PER_SCALE, HAS_ZERO, WIDTH, MATH, ASM, SPLIT, FORMAT,
    )  # fmt: skip
    weight = tl.where(computed, tl.load(weights + pair).to(tl.float32), 0.0)
    # Columns of the tile without a pair are zero.
    share = tl.sum(acc, 1) * weight
    tile = pid_t * tl.num_programs(0) + pid_n
    parts = partial + tile.to(tl.int64) * (SHARES * BLOCK_N) + tl.arange(0, BLOCK_N)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    if SHARES > 1:
        tl.store(parts + pid_s * BLOCK_N, share)
        tl.debug_barrier()  # every thread has stored its part before one of them counts
        if tl.atomic_add(semaphores + tile, 1, sem="acq_rel") == SHARES - 1:
            total = tl.zeros([BLOCK_N], tl.float32)
            for part in range(SHARES):
                total += tl.load(parts + part * BLOCK_N, cache_modifier=".cg")
            tl.store(semaphores + tile, 0)
            tl.store(out + pid_t.to(tl.int64) * N + wanted, total.to(out.dtype.element_ty), mask=wanted < N)
    else:
        tl.store(out + pid_t.to(tl.int64) * N + wanted, share.to(out.dtype.element_ty), mask=wanted < N)


@triton.jit
def _combine_kernel(pairs, experts, weights, out, N, E, TOP_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """Compute out [T, N], the weighted sum of the rows of pairs [T TOP_K, N] that an expert computed."""
    token = tl.program_id(1)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token.to(tl.int64) * TOP_K + j
        number = tl.load(experts + pair)
        computed = (number >= 0) & (number < E)
        row = tl.load(pairs + pair * N + cols, mask=cols < tl.where(computed, N, 0), other=0.0).to(tl.float32)
        total += row * tl.where(computed, tl.load(weights + pair).to(tl.float32), 0.0)
    tl.store(out + token.to(tl.int64) * N + cols, total.to(out.dtype.element_ty), mask=cols < N)
