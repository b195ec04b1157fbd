"""The kernel of ``hf_optim::wna16`` whose warps are specialized (Gluon; Hopper's warp-group instructions and TMA).

As ``wide_kernel``, it computes tiles of the transposed output with the weight as the left operand, decoded in
registers. There all warps copy, and wait for each other at every slice of 64 columns. Here two groups of four warps
have one half of the tile's rows each, and neither waits for the other: one decodes while the other multiplies. Tensor
descriptors (TMA) copy, which one thread of the first group starts, so that a group may be a slice and a half ahead.
A group decodes 16 columns ahead of what it multiplies; scales are read a unit of 256 columns ahead, from global memory.

A third group that only copies would be the usual way. The compiler (Triton 3.6) then gives idle warps fewer registers
than products need, and ptxas makes every product wait for the one before.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common.wide_tile import finish
from .wide_kernel import ASSEMBLY

SLICE = gl.constexpr(64)
UNIT = gl.constexpr(256)
STEP = gl.constexpr(16)
STEPS = gl.constexpr(16)  # of a unit
UPPER, LOWER = gl.constexpr(0), gl.constexpr(1)  # halves of a tile


@gluon.constexpr_function
def assembly(width, part, half, is_scaled, has_zero):
    """Return the PTX that decodes slice ``part`` of words to numbers of dtype ``half`` (``wide_kernel``)."""
    return ASSEMBLY[width, part, str(half), is_scaled, has_zero]


@gluon.jit
def _copy_inputs(inputs, xs, has_x, free_x, first_m, begin, end, number, X_RING: gl.constexpr):
    """Start the copy of slice ``number``, counted from unit ``begin``, into the ring when its place is free."""
    BLOCK_M: gl.constexpr = xs.shape[1]
    at = number % X_RING
    is_one = number < (end - begin) * 4
    mbarrier.wait(free_x.index(at), (number // X_RING & 1) ^ 1, pred=is_one)
    mbarrier.expect(has_x.index(at), BLOCK_M * SLICE * 2, pred=is_one)
    where = [first_m, begin * UNIT + number * SLICE]
    tma.async_copy_global_to_shared(inputs, where, has_x.index(at), xs.index(at), pred=is_one)


@gluon.jit
def _copy_codes(codes, words, has_words, free_words, first_n, begin, end, last_tile, N, number, TILES: gl.constexpr,
                RING: gl.constexpr):  # fmt: skip
    """Start the copy of k-tile ``number``, counted from unit ``begin``, into the ring when its place is free."""
    ROWS: gl.constexpr = words.shape[1]
    at = number % RING
    is_one = number < (end - begin) * TILES
    mbarrier.wait(free_words.index(at), (number // RING & 1) ^ 1, pred=is_one)
    mbarrier.expect(has_words.index(at), 2 * ROWS * SLICE * 2, pred=is_one)
    row = gl.minimum(begin * TILES + number, last_tile) * N + first_n
    for half in gl.static_range(2):
        tma.async_copy_global_to_shared(codes, [row + half * ROWS, 0], has_words.index(at), words.index(2 * at + half),
                                        pred=is_one)  # fmt: skip


@gluon.jit
def _scales(values, unit, groups, N, rows, GROUP: gl.constexpr, SCALES: gl.constexpr):
    """Return the scales (or zero points) of the four slices of a unit, [rows] each; not read without ``SCALES``."""
    if SCALES == 0:
        v0, v1, v2, v3 = rows, rows, rows, rows
    else:
        v0 = gl.load(values + gl.minimum(unit * UNIT // GROUP, groups - 1) * N + rows)
        v1, v2, v3 = v0, v0, v0
        if SCALES > 1:
            v2 = gl.load(values + gl.minimum((unit * UNIT + 2 * SLICE) // GROUP, groups - 1) * N + rows)
            v3 = v2
        if SCALES > 2:
            v1 = gl.load(values + gl.minimum((unit * UNIT + SLICE) // GROUP, groups - 1) * N + rows)
            v3 = gl.load(values + gl.minimum((unit * UNIT + 3 * SLICE) // GROUP, groups - 1) * N + rows)
    return v0, v1, v2, v3


@gluon.jit
def _decode(words, minus, factor, step: gl.constexpr, WIDTH: gl.constexpr, SCALES: gl.constexpr,
            HAS_ZERO: gl.constexpr, HALF: gl.constexpr):  # fmt: skip
    """Return 16 columns of the weight of words [rows, SLICE] in shared memory: step ``step`` of a unit."""
    TEXT: gl.constexpr = assembly(WIDTH, step // 4 % (16 // WIDTH), HALF, SCALES > 0, HAS_ZERO)
    left: gl.constexpr = gl.DotOperandLayout(0, gl.constexpr(minus.type.layout.parent.parent), 2)
    code = words.slice(step % 4 * STEP, STEP, 1).load(left)
    code, minus2 = gl.broadcast(code, minus[:, None])
    code, factor2 = gl.broadcast(code, (factor if SCALES > 0 else minus)[:, None])
    return gl.inline_asm_elementwise(TEXT, "=r,r,r,r", [code, minus2, factor2], dtype=minus.dtype, is_pure=True, pack=2)


@gluon.jit
def _minus(zero, WIDTH: gl.constexpr, MAGIC: gl.constexpr, HAS_ZERO: gl.constexpr, HALF: gl.constexpr):
    """Return what is added to a code: minus its zero point and the magic number."""
    if HAS_ZERO:
        minus = (-(zero.to(gl.float32) + MAGIC)).to(HALF)
    else:
        minus = gl.full([zero.shape[0]], -(MAGIC + (1 << (WIDTH - 1))), HALF, zero.type.layout)
    return minus


@gluon.jit
def _multiply(
    half: gl.constexpr, inputs, codes, xs, words, has_x, free_x, has_words, free_words, scale, zero, bias, out,
    partial, semaphores, tile, part, split, first_m, first_n, begin, end, last_tile, groups, M, N,
    GROUP: gl.constexpr, SCALES: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr,
    MAGIC: gl.constexpr, IS_SPLIT: gl.constexpr, X_RING: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Compute half ``half`` of a tile, units ``begin`` to ``end``, by four warps; those of half 0 start all copies."""
    TILES: gl.constexpr = WIDTH // 4
    BLOCK_M: gl.constexpr = xs.shape[1]
    ROWS: gl.constexpr = words.shape[1]
    HALF: gl.constexpr = xs.dtype
    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    lines: gl.constexpr = gl.SliceLayout(1, left)
    row = gl.minimum(first_n + half * ROWS + gl.arange(0, ROWS, lines), N - 1)

    f0, f1, f2, f3 = _scales(scale, begin, groups, N, row, GROUP, SCALES)
    z0, z1, z2, z3 = f0, f1, f2, f3
    if HAS_ZERO:
        if SCALES > 0:
            z0, z1, z2, z3 = _scales(zero, begin, groups, N, row, GROUP, SCALES)
        else:
            z0 = gl.load(zero + row)
            z1, z2, z3 = z0, z0, z0
    if half == 0:
        for early in gl.static_range(RING - 1):
            _copy_codes(codes, words, has_words, free_words, first_n, begin, end, last_tile, N, early, TILES, RING)
        for early in gl.static_range(X_RING - 2):
            _copy_inputs(inputs, xs, has_x, free_x, first_m, begin, end, early, X_RING)
    acc = gl.zeros([ROWS, BLOCK_M], gl.float32, sums)
    before = gl.zeros([ROWS, STEP], HALF, left)
    mbarrier.wait(has_words.index(0), 0)
    now = _decode(words.index(half), _minus(z0, WIDTH, MAGIC, HAS_ZERO, HALF), f0, 0, WIDTH, SCALES, HAS_ZERO, HALF)
    for unit in range(begin, end):
        # The scales of the unit that follows: read now, needed at the last step.
        g0, g1, g2, g3 = _scales(scale, unit + 1, groups, N, row, GROUP, SCALES)
        y0, y1, y2, y3 = z0, z1, z2, z3
        if HAS_ZERO and SCALES > 0:
            y0, y1, y2, y3 = _scales(zero, unit + 1, groups, N, row, GROUP, SCALES)
        for step in gl.static_range(STEPS):
            number = (unit - begin) * 4 + step // 4
            at = number % X_RING
            if step % 4 == 0:
                mbarrier.wait(has_x.index(at), number // X_RING & 1)
            piece = xs.index(at).slice(step % 4 * STEP, STEP, 1).permute((1, 0))
            acc = warpgroup_mma(now, piece, acc, is_async=True)
            # The product before this one has ended: with it a slice of inputs, perhaps a k-tile of codes.
            acc, before = warpgroup_mma_wait(1, deps=[acc, before])
            before = now
            if step % 4 == 0:
                mbarrier.arrive(free_x.index((number + X_RING - 1) % X_RING), pred=number > 0)
            if step % (STEPS // TILES) == 0:
                done = (unit - begin) * TILES + step * TILES // STEPS
                mbarrier.arrive(free_words.index((done + RING - 1) % RING), pred=done > 0)
            # Decode the step that follows while this product runs. Registers of a product cannot be set between a
            # product and a wait: ptxas would make every product wait for the one before.
            factors, zeros = (f0, f1, f2, f3), (z0, z1, z2, z3)
            if step + 1 == STEPS:
                factors, zeros = (g0, g1, g2, g3), (y0, y1, y2, y3)
            k_tile = (unit - begin) * TILES + (step + 1) * TILES // STEPS
            place = k_tile % RING
            if (step + 1) % (STEPS // TILES) == 0:
                mbarrier.wait(has_words.index(place), k_tile // RING & 1, pred=k_tile < (end - begin) * TILES)
            minus = _minus(zeros[(step + 1) % STEPS // 4], WIDTH, MAGIC, HAS_ZERO, HALF)
            now = _decode(words.index(2 * place + half), minus, factors[(step + 1) % STEPS // 4], (step + 1) % STEPS,
                          WIDTH, SCALES, HAS_ZERO, HALF)  # fmt: skip
            # Places that both groups have left: the other one may be behind.
            if half == 0:
                if step % 4 == 2:
                    _copy_inputs(inputs, xs, has_x, free_x, first_m, begin, end, number + X_RING - 2, X_RING)
                if step % (STEPS // TILES) == STEPS // TILES - 1:
                    ahead = (unit - begin) * TILES + step * TILES // STEPS + RING - 1
                    _copy_codes(codes, words, has_words, free_words, first_n, begin, end, last_tile, N, ahead, TILES,
                                RING)  # fmt: skip
        f0, f1, f2, f3 = g0, g1, g2, g3
        z0, z1, z2, z3 = y0, y1, y2, y3
    acc, before = warpgroup_mma_wait(0, deps=[acc, before])
    finish(acc, partial, semaphores, scale, bias, out, 2 * tile + half, part, split, first_m, first_n + half * ROWS,
           M, N, SCALES == 0, HAS_BIAS, IS_SPLIT)  # fmt: skip


@gluon.jit(do_not_specialize=["M", "split"])
def specialized_kernel(
    inputs, codes, scale, zero, bias, out, partial, semaphores, M, N, K, split,
    GROUP: gl.constexpr, SCALES: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr,
    MAGIC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr,
    X_RING: gl.constexpr, RING: gl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N]; programs (rows fastest, then columns; split).

    ``inputs`` describes x [M, K] in tiles [BLOCK_M, SLICE], ``codes`` int16 [k-tiles * N, SLICE] in tiles
    [BLOCK_N / 2, SLICE]; scale and zero [groups, N]; partial float32, for every tile ``split`` parts; semaphores: two
    for every tile. ``SCALES`` and ``MAGIC``: see ``wide_kernel``. K is a multiple of 64, N of 16.
    """
    HALF: gl.constexpr = inputs.dtype
    ROWS: gl.constexpr = BLOCK_N // 2
    down = gl.cdiv(M, BLOCK_M)
    tile, part = gl.program_id(0), gl.program_id(1)
    first_m, first_n = tile % down * BLOCK_M, tile // down * BLOCK_N
    units = gl.cdiv(K, UNIT)
    each = gl.cdiv(units, split)
    begin = part * each
    end = gl.minimum(begin + each, units)
    gl.assume(begin < end)
    last_tile = gl.cdiv(K, 4 * UNIT // WIDTH) - 1
    groups = gl.cdiv(K, GROUP)

    xs = gl.allocate_shared_memory(HALF, [X_RING, BLOCK_M, SLICE], inputs.layout)
    words = gl.allocate_shared_memory(gl.int16, [2 * RING, ROWS, SLICE], codes.layout)
    has_x = gl.allocate_shared_memory(gl.int64, [X_RING, 1], mbarrier.MBarrierLayout())
    free_x = gl.allocate_shared_memory(gl.int64, [X_RING, 1], mbarrier.MBarrierLayout())
    has_words = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    free_words = gl.allocate_shared_memory(gl.int64, [RING, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(X_RING):
        mbarrier.init(has_x.index(place), count=1)
        mbarrier.init(free_x.index(place), count=2)
    for place in gl.static_range(RING):
        mbarrier.init(has_words.index(place), count=1)
        mbarrier.init(free_words.index(place), count=2)
    fence_async_shared()
    # Written out twice, since constants stay constants only in a tuple that has no name.
    gl.warp_specialize(
        [
            (_multiply, (
                UPPER, inputs, codes, xs, words, has_x, free_x, has_words, free_words, scale, zero, bias, out, partial,
                semaphores, tile, part, split, first_m, first_n, begin, end, last_tile, groups, M, N,
                GROUP, SCALES, HAS_ZERO, HAS_BIAS, WIDTH, MAGIC, IS_SPLIT, X_RING, RING,
            )),
            (_multiply, (
                LOWER, inputs, codes, xs, words, has_x, free_x, has_words, free_words, scale, zero, bias, out, partial,
                semaphores, tile, part, split, first_m, first_n, begin, end, last_tile, groups, M, N,
                GROUP, SCALES, HAS_ZERO, HAS_BIAS, WIDTH, MAGIC, IS_SPLIT, X_RING, RING,
            )),
        ],
        [4], [240],
    )  # fmt: skip
