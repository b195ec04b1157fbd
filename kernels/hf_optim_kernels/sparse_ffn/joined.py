"""Sparse feed-forward layers whose chosen rows of both matrices are read in one launch.

A program chooses the units of some blocks, and asks for their rows of W2 before it multiplies those of W1: a row of W2
does not wait for a launch of its own. What remains is to add up a part [out] for each program, in a third launch.
(Behind a barrier of all programs, in a cooperative launch, that took longer on an H200: a barrier costs more than one.)

For matrices of floats. Parts are added in the order of the programs, so equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..experts.activation import activate
from .kernel import _await_before, _largest, _logits, _probability, _row_products

MOST_NUMBERS = 1 << 15
"""Of W2 that a program holds at a time."""


@triton.jit
def _units_kernel(
    x, projected, second, logit_bias, up, up_bias, gate, gate_bias, down, units_out, partial,
    N, B, R, K, D, alpha,
    NP: tl.constexpr, LOGIT_BIAS: tl.constexpr, BIAS: tl.constexpr, GATE_BIAS: tl.constexpr, GATED: tl.constexpr,
    ACT: tl.constexpr, WEIGHTED: tl.constexpr, EVEN_R: tl.constexpr, EVEN: tl.constexpr, EVEN_D: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
    ONCE: tl.constexpr, PROGRAMS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute partial [PROGRAMS, T, D], sums over the blocks of a program; programs are (token, part of the blocks).

    BLOCK_D is D, up to a power of two.
    """
    token, part = tl.program_id(0), tl.program_id(1)
    own_x = x + token.to(tl.int64) * K
    d = tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for tile in range(part, tl.cdiv(B, BLOCK_B), PROGRAMS):
        table = _logits(
            x, projected + token * R, second, logit_bias, tile, N, B, R, NP, LOGIT_BIAS, EVEN_R, BLOCK_B, BLOCK_R,
            STAGES, ONCE, EARLY,
        )  # fmt: skip
        own = tile * BLOCK_B + tl.arange(0, BLOCK_B)
        inside = own < B
        units = _largest(table, own, inside, N)
        # Rows of W2 are on their way while those of W1 are multiplied.
        at = down + units.to(tl.int64)[:, None] * D + d[None, :]
        rows = tl.load(at) if EVEN_D else tl.load(at, mask=inside[:, None] & (d < D)[None, :], other=0.0)
        h = _row_products(own_x, up, up, units, inside, K, K, 16, EVEN, BLOCK_B, BLOCK_K, STAGES)
        if BIAS:
            h += tl.load(up_bias + units).to(tl.float32)
        if GATED:
            g = _row_products(own_x, gate, gate, units, inside, K, K, 16, EVEN, BLOCK_B, BLOCK_K, STAGES)
            if GATE_BIAS:
                g += tl.load(gate_bias + units).to(tl.float32)
            h *= activate(g, alpha, ACT)
        else:
            h = activate(h, alpha, ACT)
        if WEIGHTED:
            h *= _probability(table)
        tl.store(units_out + token * B + own, units, mask=inside)
        h = tl.where(inside, h, 0.0)
        acc += tl.sum(rows.to(tl.float32) * h[:, None], axis=0)
    tl.store(partial + (part.to(tl.int64) * tl.num_programs(0) + token) * D + d, acc, mask=d < D)


@triton.jit
def _sum_kernel(
    partial, bias, out, D,
    HAS_BIAS: tl.constexpr, BLOCK_D: tl.constexpr, PROGRAMS: tl.constexpr, PADDED: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Store out [T, D], the sum of partial [PROGRAMS, T, D]: programs are (token, tile of columns)."""
    token, tile = tl.program_id(0), tl.program_id(1)
    _await_before(EARLY)
    d, p = tile * BLOCK_D + tl.arange(0, BLOCK_D), tl.arange(0, PADDED)
    at = (p.to(tl.int64)[:, None] * tl.num_programs(0) + token) * D + d[None, :]
    mask = (p < PROGRAMS)[:, None] & (d < D)[None, :]
    y = tl.sum(tl.load(partial + at, mask=mask, other=0.0), axis=0)
    if HAS_BIAS:
        y += tl.load(bias + d, mask=d < D, other=0.0).to(tl.float32)
    tl.store(out + token.to(tl.int64) * D + d, y.to(out.dtype.element_ty), mask=d < D)
