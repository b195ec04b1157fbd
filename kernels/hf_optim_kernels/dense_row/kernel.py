"""One row times a dense weight: each program reads whole rows of the weight, as many as every other.

A product of one row is a read of the weight. A library's kernel reaches 54 to 93 % of the bandwidth of a copy on an
H200, least with small layers: its last round of programs is not full, and each launch begins with empty queues of
loads. Here all programs run at once and divide the rows evenly, loads of the next rows are always under
way, and the first ones are fetched into the L2 cache while the launch before still runs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.prefetch import LINE, fetch


@triton.jit
def _dense_row_kernel(
    x, weight, bias, out, N, K,
    BLOCK_K: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr, FULL: tl.constexpr, HAS_BIAS: tl.constexpr,
    LINES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Compute out [N] = W [N, K] x [K] (+ bias [N]); programs share blocks of ``ROWS`` rows of the weight.

    ``BLOCK_K`` is K or the next power of two; FULL: it is K. LINES: lines of the cache that a program fetches before it
    waits for the launch before. EARLY: it begins while that one still runs, and lets the next one do so.
    """
    piece, pieces = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    units = (N + ROWS - 1) // ROWS
    first, last = (units * piece // pieces).to(tl.int32), (units * (piece + 1) // pieces).to(tl.int32)
    k = tl.arange(0, BLOCK_K)
    in_row = (k < K) | FULL
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        if LINES:
            # Nothing but the weight, which no launch writes, is read before the wait.
            per_line = LINE // weight.dtype.element_ty.primitive_bitwidth * 8
            ahead = first.to(tl.int64) * ROWS * K + tl.arange(0, LINES) * per_line
            end = tl.minimum(last * ROWS, N).to(tl.int64) * K
            fetch(weight + tl.maximum(tl.minimum(ahead, end - 1), 0))
        tl.extra.cuda.gdc_wait()
    row = tl.load(x + k, mask=in_row, other=0.0)
    for unit in tl.range(first, last, num_stages=STAGES):
        n = unit * ROWS + tl.arange(0, ROWS)
        at = weight + n[:, None].to(tl.int64) * K + k[None, :]
        w = tl.load(at, mask=(n < N)[:, None] & in_row[None, :], other=0.0)
        y = tl.sum(w.to(tl.float32) * row.to(tl.float32)[None, :], axis=1)
        if HAS_BIAS:
            y += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)
        tl.store(out + n, y.to(out.dtype.element_ty), mask=n < N)
