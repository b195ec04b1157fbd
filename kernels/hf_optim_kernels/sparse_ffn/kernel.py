"""Sparse feed-forward layers for few tokens: three launches, each of which reads what it needs once.

Tokens are computed apart from each other, each with its own choice: programs of one tile and different tokens are
neighbours, so that what they share is read from memory once. A token's result does not depend on the others.

With ``EARLY`` a launch begins while the one before it ends, and waits for it before it reads what that wrote.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.splitk import is_last
from ..experts.activation import activate


@triton.jit
def _await_before(EARLY: tl.constexpr):
    """Let the next launch begin, and wait until the one before has ended."""
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def _project_kernel(
    x, first, projected, semaphores, R, K,
    SEMAPHORES: tl.constexpr, EVEN: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Compute projected [T, R] = x C1^T: programs are (token, tile of R). The first one clears ``semaphores``."""
    token, tile = tl.program_id(0), tl.program_id(1)
    _await_before(EARLY)
    if token == 0 and tile == 0:
        tl.store(semaphores + tl.arange(0, SEMAPHORES), tl.zeros((SEMAPHORES,), tl.int32))
    r, k = tile * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_K)
    inside = r < R
    at = first + r.to(tl.int64)[:, None] * K + k[None, :]
    own = x + token.to(tl.int64) * K + k
    acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        if EVEN:
            part, w = tl.load(own + start), tl.load(at + start)
        else:
            left = k < K - start
            part = tl.load(own + start, mask=left, other=0.0)
            w = tl.load(at + start, mask=inside[:, None] & left[None, :], other=0.0)
        acc += w.to(tl.float32) * part.to(tl.float32)[None, :]
    tl.store(projected + token * R + r, tl.sum(acc, axis=1).to(projected.dtype.element_ty), mask=inside)


@triton.jit
def _row_products(
    x, data, scale, units, inside, K, G,
    BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Return the products [BLOCK_B] of x [K] with rows ``units``; of codes, BLOCK_K divides a group's bytes."""
    k = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_B, BLOCK_K), tl.float32)
    groups = K // G
    if BITS == 4:
        half = G // 2
        at = data + units.to(tl.int64)[:, None] * (K // 2) + k[None, :]
        for start in tl.range(0, K // 2, BLOCK_K, num_stages=STAGES):
            group = start // half
            column = start + group * half + k
            low, high = tl.load(x + column).to(tl.float32), tl.load(x + half + column).to(tl.float32)
            pair = tl.load(at + start, mask=inside[:, None], other=0).to(tl.int32)
            own = tl.load(scale + units.to(tl.int64) * groups + group, mask=inside, other=0.0).to(tl.float32)
            part = ((pair & 15) - 8).to(tl.float32) * low[None, :] + ((pair >> 4) - 8).to(tl.float32) * high[None, :]
            acc += part * own[:, None]
    elif BITS == 8:
        at = data + units.to(tl.int64)[:, None] * K + k[None, :]
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            part = tl.load(x + start + k).to(tl.float32)
            code = tl.load(at + start, mask=inside[:, None], other=0).to(tl.float32)
            own = tl.load(scale + units.to(tl.int64) * groups + start // G, mask=inside, other=0.0).to(tl.float32)
            acc += code * part[None, :] * own[:, None]
    else:
        at = data + units.to(tl.int64)[:, None] * K + k[None, :]
        for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
            if EVEN:
                part, w = tl.load(x + start + k), tl.load(at + start)
            else:
                left = k < K - start
                part = tl.load(x + start + k, mask=left, other=0.0)
                w = tl.load(at + start, mask=inside[:, None] & left[None, :], other=0.0)
            acc += w.to(tl.float32) * part.to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def _logits(
    x, projected, second, logit_bias, tile, N, B, R,
    NP: tl.constexpr, LOGIT_BIAS: tl.constexpr, EVEN_R: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr, ONCE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Return the logits [BLOCK_B, NP] of a tile of blocks, rounded as a product of the model is; -inf beyond the units.

    ``projected`` [R] is read when the launch that wrote it has ended.
    """
    lane, r = tl.arange(0, BLOCK_B * NP), tl.arange(0, BLOCK_R)
    block, unit = tile * BLOCK_B + lane // NP, lane % NP
    valid = (block < B) & (unit < N)
    row = tl.where(valid, block * N + unit, 0)
    at = second + row.to(tl.int64)[:, None] * R + r[None, :]
    if ONCE:  # C2 does not depend on the launch before
        w = tl.load(at) if EVEN_R else tl.load(at, mask=valid[:, None] & (r < R)[None, :], other=0.0)
        _await_before(EARLY)
        part = tl.load(projected + r, mask=r < R, other=0.0)
        logits = tl.sum(w.to(tl.float32) * part.to(tl.float32)[None, :], axis=1)
    else:
        _await_before(EARLY)
        acc = tl.zeros((BLOCK_B * NP, BLOCK_R), tl.float32)
        for start in tl.range(0, R, BLOCK_R, num_stages=STAGES):
            if EVEN_R:
                part, w = tl.load(projected + start + r), tl.load(at + start)
            else:
                left = r < R - start
                part = tl.load(projected + start + r, mask=left, other=0.0)
                w = tl.load(at + start, mask=valid[:, None] & left[None, :], other=0.0)
            acc += w.to(tl.float32) * part.to(tl.float32)[None, :]
        logits = tl.sum(acc, axis=1)
    if LOGIT_BIAS:
        logits += tl.load(logit_bias + row).to(tl.float32)
    logits = logits.to(x.dtype.element_ty).to(tl.float32)
    return tl.reshape(tl.where(valid, logits, float("-inf")), (BLOCK_B, NP))


@triton.jit
def _largest(table, blocks, inside, N):
    """Return the unit of the largest logit of each block. NaN chooses nothing; the first unit keeps reads inside."""
    choice = tl.argmax(table, axis=1, tie_break_left=True)
    return tl.where(inside, blocks * N + tl.minimum(choice, N - 1), 0)


@triton.jit
def _probability(table):
    """Return the softmax of the largest logit of each block."""
    top = tl.max(table, axis=1)
    return 1.0 / tl.sum(tl.where(table == float("-inf"), 0.0, tl.exp(table - top[:, None])), axis=1)


@triton.jit
def _choose_kernel(
    x, projected, second, logit_bias, up, up_scale, up_bias, gate, gate_scale, gate_bias, units_out, inner,
    N, B, R, K, G, alpha,
    NP: tl.constexpr, LOGIT_BIAS: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, BITS: tl.constexpr, EVEN_R: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, ONCE: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """Choose a unit per block and compute it: programs are (token, tile of blocks). NP is N, up to a power of two."""
    token, tile = tl.program_id(0), tl.program_id(1)
    table = _logits(
        x, projected + token * R, second, logit_bias, tile, N, B, R, NP, LOGIT_BIAS, EVEN_R, BLOCK_B, BLOCK_R, STAGES,
        ONCE, EARLY,
    )  # fmt: skip
    own = tile * BLOCK_B + tl.arange(0, BLOCK_B)
    inside = own < B
    units = _largest(table, own, inside, N)
    h = _row_products(
        x + token.to(tl.int64) * K, up, up_scale, units, inside, K, G, BITS, EVEN, BLOCK_B, BLOCK_K, STAGES
    )
    if BIAS:
        h += tl.load(up_bias + units).to(tl.float32)
    if GATED:
        g = _row_products(
            x + token.to(tl.int64) * K, gate, gate_scale, units, inside, K, G, BITS, EVEN, BLOCK_B, BLOCK_K, STAGES
        )
        if GATE_BIAS:
            g += tl.load(gate_bias + units).to(tl.float32)
        h *= activate(g, alpha, ACT)
    else:
        h = activate(h, alpha, ACT)
    if WEIGHTED:
        h *= _probability(table)
    tl.store(units_out + token * B + own, units, mask=inside)
    tl.store(inner + token * B + own, h, mask=inside)


@triton.jit
def _down_kernel(
    units, inner, down, scale, bias, out, partial, semaphores, B, D, G,
    HAS_BIAS: tl.constexpr, BITS: tl.constexpr, EVEN: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr,
    SPLIT: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Sum the chosen rows: programs are (token, tile of columns, part of the blocks); partial [SPLIT, T, D].

    Of 4-bit codes a tile is BLOCK_D bytes, with two columns each. The last program of a tile to arrive adds the parts
    in their order.
    """
    token, tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    _await_before(EARLY)
    b = tl.arange(0, BLOCK_B)
    offset = tile * BLOCK_D + tl.arange(0, BLOCK_D)
    width, groups = D, D // G
    column, beside, group = offset, offset, tile * 0
    if BITS == 4:
        width = D // 2
        half = G // 2
        group = tile * BLOCK_D // half
        column = offset + group * half
        beside = column + half
    elif BITS == 8:
        group = tile * BLOCK_D // G
    inside = offset < width
    acc = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    more = tl.zeros((BLOCK_B, BLOCK_D), tl.float32)
    for start in tl.range(part * BLOCK_B, B, SPLIT * BLOCK_B, num_stages=STAGES):
        left = b < B - start
        unit = tl.load(units + token * B + start + b, mask=left, other=0).to(tl.int64)
        h = tl.load(inner + token * B + start + b, mask=left, other=0.0)
        if BITS < 16:
            h *= tl.load(scale + unit * groups + group).to(tl.float32)
        at = down + unit[:, None] * width + offset[None, :]
        w = tl.load(at) if EVEN else tl.load(at, mask=left[:, None] & inside[None, :], other=0)
        if BITS == 4:
            pair = w.to(tl.int32)
            acc += ((pair & 15) - 8).to(tl.float32) * h[:, None]
            more += ((pair >> 4) - 8).to(tl.float32) * h[:, None]
        else:
            acc += w.to(tl.float32) * h[:, None]
    y = tl.sum(acc, axis=0)
    if BITS == 4:
        z = tl.sum(more, axis=0)
    at = token.to(tl.int64) * D
    if SPLIT > 1:
        size = tl.num_programs(0).to(tl.int64) * D
        tl.store(partial + part * size + at + column, y, mask=inside)
        if BITS == 4:
            tl.store(partial + part * size + at + beside, z, mask=inside)
        last = is_last(semaphores, token * tl.num_programs(1) + tile, SPLIT)
        if last:
            y = tl.zeros((BLOCK_D,), tl.float32)
            for other in tl.static_range(SPLIT):
                y += tl.load(partial + other * size + at + column, mask=inside, other=0.0, cache_modifier=".cg")
            if HAS_BIAS:
                y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at + column, y.to(out.dtype.element_ty), mask=inside)
            if BITS == 4:
                z = tl.zeros((BLOCK_D,), tl.float32)
                for other in tl.static_range(SPLIT):
                    z += tl.load(partial + other * size + at + beside, mask=inside, other=0.0, cache_modifier=".cg")
                if HAS_BIAS:
                    z += tl.load(bias + beside, mask=inside, other=0.0).to(tl.float32)
                tl.store(out + at + beside, z.to(out.dtype.element_ty), mask=inside)
    else:
        if HAS_BIAS:
            y += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + at + column, y.to(out.dtype.element_ty), mask=inside)
        if BITS == 4:
            if HAS_BIAS:
                z += tl.load(bias + beside, mask=inside, other=0.0).to(tl.float32)
            tl.store(out + at + beside, z.to(out.dtype.element_ty), mask=inside)
