"""One row times dense weights: each program reads whole rows of them, as many as every other.

A product of one row is a read of the weight. A library's kernel reaches 54 to 93 % of the bandwidth of a copy on an
H200, least with small layers: its last round of programs is not full, and each launch begins with empty queues of
loads. Here all programs run at once and divide the rows evenly, loads of the next rows are always under
way, and the first ones are fetched into the L2 cache while the launch before still runs. Layers that read the same row
share a launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.prefetch import LINE, fetch
from ..experts.activation import activate


@triton.jit
def _dense_row_kernel(
    x, w0, w1, w2, b0, b1, b2, out0, out1, out2, N0, N1, N2, K,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr, COUNT: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACT: tl.constexpr, STRIDED: tl.constexpr, LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute out_i [N_i] = W_i [N_i, K] x [K] (+ b_i [N_i]); programs share blocks of ``ROWS`` rows of the weights.

    ``BLOCK_K`` is K or the next power of two; FULL: it is K. COUNT: weights, 1 to 3. ACT: of -1, none; else W_0 and W_1
    are a gate and its values, and out_0 = act(W_0 x) * (W_1 x). STRIDED: programs read one block each, then the next
    ones; else each has blocks that follow each other. LINES: lines of the cache that a program fetches before it waits
    for the launch before. EARLY: it begins while that one still runs, and lets the next one do so. Numbers are rounded
    where PyTorch's operators round them.
    """
    dtype = w0.dtype.element_ty
    piece, pieces = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    # The first block of the second and third weight.
    second = (N0 + ROWS - 1) // ROWS
    third = second
    units = second
    if ACT < 0:
        if COUNT > 1:
            third = second + (N1 + ROWS - 1) // ROWS
            units = third
        if COUNT > 2:
            units = third + (N2 + ROWS - 1) // ROWS
    if STRIDED:
        first, last, step, fetched = piece.to(tl.int32), units, pieces, 1
    else:
        first, last = (units * piece // pieces).to(tl.int32), (units * (piece + 1) // pieces).to(tl.int32)
        step, fetched = 1, last - first
    k = tl.arange(0, BLOCK_K)
    in_row = (k < K) | FULL
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if LINES:
            # Nothing but weights, which no launch writes, is read before the wait.
            per_line = LINE // dtype.primitive_bitwidth * 8
            weight, N, block = w0, N0, first
            if ACT < 0:
                if COUNT > 1:
                    weight, N = tl.where(first < second, w0, w1), tl.where(first < second, N0, N1)
                    block = tl.where(first < second, first, first - second)
                if COUNT > 2:
                    weight, N = tl.where(first < third, weight, w2), tl.where(first < third, N, N2)
                    block = tl.where(first < third, block, first - third)
            ahead = block.to(tl.int64) * ROWS * K + tl.arange(0, LINES) * per_line
            end = tl.minimum((block + fetched) * ROWS, N).to(tl.int64) * K
            ahead = tl.maximum(tl.minimum(ahead, end - 1), 0)
            fetch(weight + ahead)
            if ACT >= 0:
                fetch(w1 + ahead)
        tl.extra.cuda.gdc_wait()
    row = tl.load(x + k, mask=in_row, other=0.0)
    for unit in tl.range(first, last, step, num_stages=STAGES):
        weight, bias, out, N, block = w0, b0, out0, N0, unit
        if ACT < 0:
            if COUNT > 1:
                weight, bias = tl.where(unit < second, w0, w1), tl.where(unit < second, b0, b1)
                out, N = tl.where(unit < second, out0, out1), tl.where(unit < second, N0, N1)
                block = tl.where(unit < second, unit, unit - second)
            if COUNT > 2:
                weight, bias = tl.where(unit < third, weight, w2), tl.where(unit < third, bias, b2)
                out, N = tl.where(unit < third, out, out2), tl.where(unit < third, N, N2)
                block = tl.where(unit < third, block, unit - third)
        n = block * ROWS + tl.arange(0, ROWS)
        at = n[:, None].to(tl.int64) * K + k[None, :]
        inside = (n < N)[:, None] & in_row[None, :]
        w = tl.load(weight + at, mask=inside, other=0.0)
        y = tl.sum(w.to(tl.float32) * row.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        if ACT >= 0:
            up = tl.sum(tl.load(w1 + at, mask=inside, other=0.0).to(tl.float32) * row.to(tl.float32)[None, :], axis=1)
            if HAS_BIAS:
                up += tl.load(b1 + n, mask=n < N, other=0.0).to(tl.float32)
            y = activate(y.to(dtype).to(tl.float32), 1.0, ACT).to(dtype).to(tl.float32) * up.to(dtype).to(tl.float32)
        tl.store(out + n, y.to(dtype), mask=n < N)
