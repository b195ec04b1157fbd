"""The Triton kernels of ``hf_optim::sparse24`` (specified by ``naive``).

Inputs are read as words of 64 bits, the four columns of a 2:4 group, which shifts take apart: all loads are contiguous.
A program goes over whole k-tiles (``2 * naive.HALF`` groups) of a range of the columns. ``SPLIT > 1`` is split-k: each
program leaves its sums in memory, and the last to arrive at a tile of the output adds them in a fixed order, so that
the same input gives the same bits, in one launch.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP32
from . import naive
from .triton_helpers import as_number, numbers, place

HALF = tl.constexpr(naive.HALF)


@triton.jit
def _finish(
    acc, partial, semaphores, bias, scale, out, tile, rows, wanted, M, N,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Apply row scales and the bias to ``acc`` [BLOCK_N, rows], or with ``SPLIT`` to its sum over programs; store it.

    Programs of a tile count themselves in ``semaphores``, which are zero again afterwards; the last one stores.
    """
    pid_s = tl.program_id(2)
    cols = tl.minimum(wanted, N - 1)
    mask = (rows < M)[None, :] & (wanted < N)[:, None]
    at = rows.to(tl.int64)[None, :] * N + wanted[:, None]
    last = True
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        tl.store(partial + pid_s * size + at, acc, mask=mask)
        # All threads have stored before one of them counts, which publishes the stores.
        tl.debug_barrier()
        arrived = tl.atomic_add(semaphores + tile, 1, sem="acq_rel")
        last = arrived == SPLIT - 1
        if last:
            acc = tl.zeros_like(acc)
            for part in range(SPLIT):
                acc += tl.load(partial + part * size + at, mask=mask, other=0.0, cache_modifier=".cg")
            tl.store(semaphores + tile, 0)
    if last:
        if SCALES == "row":
            acc *= tl.load(scale + cols).to(tl.float32)[:, None]
        if HAS_BIAS:
            acc += tl.load(bias + cols).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _range(groups24, SPLIT: tl.constexpr):
    """Return the k-tiles of this program: first and end."""
    tiles = tl.cdiv(groups24, 2 * HALF)
    each = tl.cdiv(tiles, SPLIT)
    first = tl.program_id(2) * each
    return first, tl.minimum(first + each, tiles)


@triton.jit
def _weights(
    values, w_rows, bits, scale, zero, cols, g, N, groups24,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the weights of columns 0 to 3 of the 2:4 groups ``g``, and where the scale [BLOCK_N, 1] of a "step" is."""
    # Groups past the end, whose inputs are zeros, take the last scale.
    inside = tl.minimum(g, groups24 - 1)
    one = tl.min(inside, 0) // GROUP * N + cols[:, None]
    group_at = (inside // GROUP)[None, :] * N + cols[:, None] if SCALES == "each" else one
    v0, v1 = numbers(
        values, w_rows[:, None] + g[None, :], scale, zero, group_at, WIDTH, SCALES, HAS_ZERO, ZERO_OFFSET, MATH
    )
    w0, w1, w2, w3 = place(v0, v1, bits, HIGH, MATH, ASM)
    return w0, w1, w2, w3, one


@triton.jit
def _step(
    acc, x_rows, values, w_rows, bits, scale, zero, rows, cols, g, M, N, groups24,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of the 2:4 groups ``g`` [GROUPS24] to ``acc`` [BLOCK_N, BLOCK_M].

    The weight is the left operand, so that its numbers go from registers into the tensor cores.
    """
    fits = (rows < M)[None, :] if EVEN else (rows < M)[None, :] & (g < groups24)[:, None]
    words = tl.load(x_rows[None, :] + g[:, None], mask=fits, other=0)
    w0, w1, w2, w3, one = _weights(values, w_rows, bits, scale, zero, cols, g, N, groups24,
                                   HIGH, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, MATH, ASM)  # fmt: skip
    part = tl.zeros_like(acc) if SCALES == "step" else acc
    part = tl.dot(w0, as_number(words.to(tl.int16), MATH), part, input_precision="ieee")
    part = tl.dot(w1, as_number((words >> 16).to(tl.int16), MATH), part, input_precision="ieee")
    part = tl.dot(w2, as_number((words >> 32).to(tl.int16), MATH), part, input_precision="ieee")
    part = tl.dot(w3, as_number((words >> 48).to(tl.int16), MATH), part, input_precision="ieee")
    return acc + part * tl.load(scale + one).to(tl.float32) if SCALES == "step" else part


@triton.jit(do_not_specialize=["M"])
def dot_kernel(
    x, values, bits, scale, zero, bias, out, partial, semaphores, M, N, groups24, stored,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS24: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Compute tiles of the output on tensor cores; programs (rows, columns of the output, split).

    x [M, groups24] words of 64 bits, values and bits as ``naive.pack`` makes them (``stored`` groups per row), scale
    and zero [groups, N], out [M, N], partial float32 [SPLIT, M, N], semaphores int32, a zero for each tile. ``GROUP``
    counts 2:4 groups; a step has ``GROUPS24``.
    """
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end repeat the last one and are not stored: loads of the weight then need no mask.
    cols = tl.minimum(wanted, N - 1)
    x_rows = x.to(tl.pointer_type(tl.int64)) + rows.to(tl.int64) * groups24
    w_rows = cols.to(tl.int64) * stored
    b_rows = bits + cols.to(tl.int64) * (stored // 2)
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    first, end = _range(groups24, SPLIT)
    for k_tile in range(first, end):
        for part in tl.static_range(HALF // GROUPS24):
            at = part * GROUPS24 + tl.arange(0, GROUPS24)
            both = tl.load(b_rows[:, None] + (at + k_tile * HALF)[None, :])
            g = at + k_tile * 2 * HALF
            acc = _step(acc, x_rows, values, w_rows, both, scale, zero, rows, cols, g, M, N, groups24,
                        False, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, EVEN, MATH, ASM)  # fmt: skip
            acc = _step(acc, x_rows, values, w_rows, both, scale, zero, rows, cols, g + HALF, M, N, groups24,
                        True, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, EVEN, MATH, ASM)  # fmt: skip
    tile = pid_n * tl.num_programs(0) + pid_m
    _finish(acc, partial, semaphores, bias, scale, out, tile, rows, wanted, M, N, SCALES, HAS_BIAS, SPLIT)


@triton.jit
def _row_step(
    acc, x_words, values, w_rows, bits, scale, zero, cols, g, N, groups24,
    HIGH: tl.constexpr, WIDTH: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
    ZERO_OFFSET: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Add the products of the 2:4 groups ``g`` [GROUPS24] to ``acc`` [BLOCK_N, GROUPS24], in float32."""
    words = tl.load(x_words + g) if EVEN else tl.load(x_words + g, mask=g < groups24, other=0)
    w0, w1, w2, w3, one = _weights(values, w_rows, bits, scale, zero, cols, g, N, groups24,
                                   HIGH, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, MATH, ASM)  # fmt: skip
    part = tl.zeros_like(acc) if SCALES == "step" else acc
    part += w0.to(tl.float32) * as_number(words.to(tl.int16), MATH).to(tl.float32)[None, :]
    part += w1.to(tl.float32) * as_number((words >> 16).to(tl.int16), MATH).to(tl.float32)[None, :]
    part += w2.to(tl.float32) * as_number((words >> 32).to(tl.int16), MATH).to(tl.float32)[None, :]
    part += w3.to(tl.float32) * as_number((words >> 48).to(tl.int16), MATH).to(tl.float32)[None, :]
    return acc + part * tl.load(scale + one).to(tl.float32) if SCALES == "step" else part


@triton.jit(do_not_specialize=["M"])
def row_kernel(
    x, values, bits, scale, zero, bias, out, partial, semaphores, M, N, groups24, stored,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr, EVEN: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS24: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute a row of the input per program (``BLOCK_M`` is 1), without tensor cores. Arguments as ``dot_kernel``."""
    pid_m, pid_n = tl.program_id(0), tl.program_id(1)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.minimum(wanted, N - 1)
    x_words = x.to(tl.pointer_type(tl.int64)) + pid_m.to(tl.int64) * groups24
    w_rows = cols.to(tl.int64) * stored
    b_rows = bits + cols.to(tl.int64) * (stored // 2)
    acc = tl.zeros([BLOCK_N, GROUPS24], tl.float32)
    first, end = _range(groups24, SPLIT)
    for k_tile in tl.range(first, end, num_stages=STAGES):
        for part in tl.static_range(HALF // GROUPS24):
            at = part * GROUPS24 + tl.arange(0, GROUPS24)
            both = tl.load(b_rows[:, None] + (at + k_tile * HALF)[None, :])
            g = at + k_tile * 2 * HALF
            acc = _row_step(acc, x_words, values, w_rows, both, scale, zero, cols, g, N, groups24,
                            False, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, EVEN, MATH, ASM)  # fmt: skip
            acc = _row_step(acc, x_words, values, w_rows, both, scale, zero, cols, g + HALF, N, groups24,
                            True, WIDTH, SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, EVEN, MATH, ASM)  # fmt: skip
    tile = pid_n * tl.num_programs(0) + pid_m
    rows = pid_m + tl.arange(0, 1)
    _finish(tl.sum(acc, 1)[:, None], partial, semaphores, bias, scale, out, tile, rows, wanted, M, N,
            SCALES, HAS_BIAS, SPLIT)  # fmt: skip


@triton.jit
def _word(w0, w1, w2, w3):
    """Return four weights of 16 bits as one word."""
    low = (w0.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) | (
        (w1.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) << 16
    )
    high = (w2.to(tl.int16, bitcast=True).to(tl.int64) & 0xFFFF) | (w3.to(tl.int16, bitcast=True).to(tl.int64) << 16)
    return low | (high << 32)


@triton.jit
def decompress_kernel(
    values, bits, scale, zero, out, N, groups24, stored,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, MATH: tl.constexpr,
    ASM: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write the dense weight [N, 4 * groups24] as words of 64 bits; programs (rows, k-tiles)."""
    wanted = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.minimum(wanted, N - 1)
    k_tile, at = tl.program_id(1), tl.arange(0, HALF)
    both = tl.load(bits + cols.to(tl.int64)[:, None] * (stored // 2) + (at + k_tile * HALF)[None, :])
    for part in tl.static_range(2):
        g = at + k_tile * 2 * HALF + part * HALF
        group_at = (tl.minimum(g, groups24 - 1) // GROUP)[None, :] * N + cols[:, None]
        v0, v1 = numbers(values, cols.to(tl.int64)[:, None] * stored + g[None, :], scale, zero, group_at,
                         WIDTH, "each", HAS_ZERO, ZERO_OFFSET, MATH)  # fmt: skip
        w0, w1, w2, w3 = place(v0, v1, both, part == 1, MATH, ASM)
        if MATH == FP32:
            # Interpreted bfloat16: the upper half of a float32, rounded to it.
            w0, w1 = w0.to(tl.bfloat16), w1.to(tl.bfloat16)
            w2, w3 = w2.to(tl.bfloat16), w3.to(tl.bfloat16)
        target = out.to(tl.pointer_type(tl.int64)) + wanted.to(tl.int64)[:, None] * groups24 + g[None, :]
        tl.store(target, _word(w0, w1, w2, w3), mask=(wanted < N)[:, None] & (g < groups24)[None, :])
