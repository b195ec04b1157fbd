"""The kernel of ``hf_optim::wna16`` for products bound by arithmetic (Gluon; Hopper's warp-group instructions).

A program computes a tile [BLOCK_N, BLOCK_M] of the transposed output. The weight is the left operand, decoded and
scaled in registers in the layout of the instruction, so that only inputs are read from shared memory. The product of a
slice of 64 columns runs while the next slice is decoded; ``kernel._linear_kernel``, which Triton pipelines by itself,
waits for every product. A scaled weight is rounded to 16 bits, as the weight that ``_dense_kernel`` writes; with one
scale per row nothing is rounded: the sums are scaled.

Columns are read in units of four slices: copies of inputs are three slices ahead, those of the codes a whole unit.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..common.wide_tile import finish
from . import float4

SLICE = gl.constexpr(64)
FACTOR = gl.constexpr(float4.FACTOR)
UNIT = gl.constexpr(256)
STEP = gl.constexpr(16)


def _assembly(width: int, part: int, half: str, is_scaled: bool, has_zero: bool) -> str:
    """Return PTX that decodes a part of two words $1 to $0, with a scale $3.

    $2 is what is added to a code: minus the zero point and the magic number that makes the code a number (``decode``);
    nothing, with 8 bits and without zero points.
    """
    kind, magic, one = {"bf16": ("bf16x2", "0x43004300", "0x3F803F80"), "fp16": ("f16x2", "0x64006400", "0x3C003C00")}[
        half
    ]
    lines = [".reg .b32 code, one, sign;", f"mov.b32 one, {one};"]
    source = "$1"
    if part:
        lines.append(f"shr.u32 code, $1, {part * width};")
        source = "code"
    if width == 4:
        lines.append(f"lop3.b32 code, {source}, 0x000F000F, {magic}, 0xEA;")
    elif half == "bf16":
        # 128 + the low seven bits, minus 128 where the eighth is set, else 256: the code minus 128.
        lines += [f"lop3.b32 sign, {source}, 0x00800080, {magic}, 0xAE;"]
        lines += [f"lop3.b32 code, {source}, 0x007F007F, {magic}, 0xEA;"]
        lines += ["mov.b32 one, 0xBF80BF80;", "fma.rn.bf16x2 code, sign, one, code;", f"mov.b32 one, {one};"]
    else:
        lines += [f"lop3.b32 code, {source}, 0x00FF00FF, {magic}, 0xEA;", "mov.b32 sign, 0xE480E480;"]  # -1152
        lines += ["fma.rn.f16x2 code, code, one, sign;"]
    if width == 4 or has_zero:
        lines += [f"fma.rn.{kind} code, code, one, $2;"]
    lines += [f"mul.rn.{kind} $0, code, $3;" if is_scaled else "mov.b32 $0, code;"]
    return "{ " + " ".join(lines) + " }"


# How the bits of slice ``part`` of a word of 4-bit floats come to their places (``float4``): a shift to the left (or
# right) of the magnitude, then of the sign, for bfloat16 and float16.
_PLACES = {"bf16": ((0, 0), (3, 3), (6, 1), (-3, 2)), "fp16": ((3, 0), (6, 3), (9, 1), (0, 2))}


def _float_assembly(format: int, part: int, half: str) -> str:
    """Return PTX that decodes a part of two words $1 to $0, with the scales of byte ``part`` of the word $2 (as $3).

    See ``decode.scaled_floats`` for what the numbers are multiplied with.
    """
    kind, bits, big = {"bf16": ("bf16x2", "0x01C001C0", "0x7E807E80"), "fp16": ("f16x2", "0x0E000E00", "0x74007400")}[
        half
    ]
    magnitude, sign = _PLACES[half][part]
    lines = [".reg .b32 m, s, f, zero, other;"]
    lines += [f"{'shl.b32' if magnitude >= 0 else 'shr.u32'} m, $1, {abs(magnitude)};", f"shl.b32 s, $1, {sign};"]
    lines += ["and.b32 s, s, 0x80008000;", f"lop3.b32 m, m, {bits}, s, 0xEA;"]
    lines += [f"shr.u32 f, $2, {8 * part};", "and.b32 f, f, 255;", "mov.b32 zero, 0x80008000;"]
    if format == 2:
        lines += ["shl.b32 f, f, 7;", "max.u32 f, f, 64;", "mul.lo.u32 f, f, 0x00010001;"]
        lines += [f"mov.b32 other, {big};", f"fma.rn.{kind} m, m, other, zero;"]
    elif half == "bf16":
        lines += ["mad.lo.u32 f, f, 0x00100010, 0x70007000;", "mov.b32 other, 0x3F803F80;", "mov.b32 s, 0xF000F000;"]
        lines += [f"fma.rn.{kind} f, f, other, s;"]
    else:
        lines += ["mul.lo.u32 f, f, 0x00800080;"]
    return "{ " + " ".join([*lines, f"fma.rn.{kind} $0, m, f, zero;"]) + " }"


FLOAT_ASSEMBLY = {
    (format, part, half): _float_assembly(format, part, half)
    for format, half in ((1, "bf16"), (1, "fp16"), (2, "bf16"))
    for part in range(4)
}
ASSEMBLY = {
    (width, part, half, is_scaled, has_zero): _assembly(width, part, half, is_scaled, has_zero)
    for width in (4, 8)
    for part in range(16 // width)
    for half in ("bf16", "fp16")
    for is_scaled in (False, True)
    for has_zero in (False, True)
}


@gluon.jit
def _copy_inputs(buffer, x, rows, first, last, stride_x, LAYOUT: gl.constexpr):
    """Copy ``x[rows, first : first + SLICE]``, or zeros from column ``last`` on; the caller commits."""
    columns = gl.arange(0, SLICE, gl.SliceLayout(0, LAYOUT))
    at = x + rows.to(gl.int64)[:, None] * stride_x + first + columns[None, :]
    inside = (rows[:, None] >= 0) & (columns[None, :] < last - first)
    async_copy.async_copy_global_to_shared(buffer, at, mask=inside)


@gluon.jit
def _copy_codes(words, packed, place, unit, end, last_tile, rows, stride_tile, WIDTH: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Copy the words of a unit into the ring at ``place``; the caller commits."""
    TILES: gl.constexpr = WIDTH // 4
    columns = gl.arange(0, SLICE, gl.SliceLayout(0, LAYOUT))
    inside = (rows[:, None] >= 0) & (columns[None, :] < (end - unit) * SLICE)
    for t in gl.static_range(TILES):
        tile = gl.minimum(unit * TILES + t, last_tile).to(gl.int64)
        at = packed + tile * stride_tile + rows[:, None] * SLICE + columns[None, :]
        async_copy.async_copy_global_to_shared(words.index(place * TILES + t), at, mask=inside)


@gluon.jit
def _copy_grids(grids, values, place, unit, end, groups, first_n, N, GROUP: gl.constexpr, SCALES: gl.constexpr,
                BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr):  # fmt: skip
    """Copy the scales (or zero points) of a unit into the ring at ``place``; the caller commits."""
    n = first_n + gl.arange(0, BLOCK_N, LAYOUT)
    inside = (n < N) & (unit < end)
    for part in gl.static_range(SCALES):
        group = gl.minimum((unit * UNIT + part * (UNIT // SCALES)) // GROUP, groups - 1)
        async_copy.async_copy_global_to_shared(grids.index(place * SCALES + part), values + group * N + n, mask=inside)


@gluon.jit
def _copy_words(grids, values, place, unit, end, first_n, N, COUNT: gl.constexpr, BLOCK_N: gl.constexpr,
                LAYOUT: gl.constexpr):  # fmt: skip
    """Copy the words of 8-bit scales of a unit, [N, COUNT] each, into the ring at ``place``; the caller commits."""
    n = first_n + gl.arange(0, BLOCK_N, LAYOUT)
    inside = (n < N) & (unit < end)
    for part in gl.static_range(COUNT):
        at = values + (gl.minimum(unit, end - 1) * N + n) * COUNT + part
        async_copy.async_copy_global_to_shared(grids.index(place * COUNT + part), at, mask=inside)


@gluon.jit(do_not_specialize=["M", "split"])
def wide_kernel(
    x, packed, scale, zero, bias, out, partial, semaphores, M, N, K, stride_x, stride_tile, split,
    GROUP: gl.constexpr, SCALES: gl.constexpr, HAS_ZERO: gl.constexpr, HAS_BIAS: gl.constexpr, WIDTH: gl.constexpr,
    DECODE: gl.constexpr, MAGIC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr,
    RING: gl.constexpr, FORMAT: gl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N]; programs (rows fastest, then columns; split).

    x [M, K], packed int16 [k-tiles, N, SLICE], scale and zero [groups, N], partial float32, for every tile ``split``
    parts. ``SCALES`` of a unit: 1, 2 or 4; 0 for one scale per row. K is a multiple of 64, N of 16, and rows of x begin
    at multiples of 16 bytes. ``MAGIC`` is what ``DECODE``, the assembly, leaves added to a code.

    Of 4-bit floats (``FORMAT`` 1 and 2, see ``float4``) scale is int32 [k-tiles, N, ``SCALES``], and of NVFP4 (1) zero
    are the divisors, float32 [N].
    """
    HALF: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    down = gl.cdiv(M, BLOCK_M)
    tile, part = gl.program_id(0), gl.program_id(1)
    first_m, first_n = tile % down * BLOCK_M, tile // down * BLOCK_N

    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    lined: gl.constexpr = gl.BlockedLayout([8], [32], [WARPS], [0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    TILES: gl.constexpr = WIDTH // 4

    x0 = gl.allocate_shared_memory(HALF, [BLOCK_M, SLICE], swizzled)
    x1 = gl.allocate_shared_memory(HALF, [BLOCK_M, SLICE], swizzled)
    x2 = gl.allocate_shared_memory(HALF, [BLOCK_M, SLICE], swizzled)
    x3 = gl.allocate_shared_memory(HALF, [BLOCK_M, SLICE], swizzled)
    inputs = (x0, x1, x2, x3)
    words = gl.allocate_shared_memory(gl.int16, [RING * TILES, BLOCK_N, SLICE], swizzled)
    if SCALES > 0:
        scales = gl.allocate_shared_memory(scale.dtype.element_ty, [RING * SCALES, BLOCK_N], plain)
        if HAS_ZERO:
            zeros = gl.allocate_shared_memory(zero.dtype.element_ty, [RING * SCALES, BLOCK_N], plain)

    # Rows beyond the end repeat the last one; they are not stored.
    m = gl.minimum(first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, wide)), M - 1)
    n = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, wide)), N - 1)
    units = gl.cdiv(K, UNIT)
    each = gl.cdiv(units, split)
    begin = part * each
    end = gl.minimum(begin + each, units)
    gl.assume(begin < end)  # else registers of sums would be set where products are in flight
    last = gl.minimum(end * UNIT, K)
    last_tile = gl.cdiv(K, UNIT // TILES) - 1
    groups = gl.cdiv(K, GROUP)

    for ahead in gl.static_range(RING):
        _copy_codes(words, packed, ahead, begin + ahead, end, last_tile, n, stride_tile, WIDTH, wide)
        if FORMAT > 0:
            _copy_words(scales, scale, ahead, begin + ahead, end, first_n, N, SCALES, BLOCK_N, lined)
        elif SCALES > 0:
            _copy_grids(scales, scale, ahead, begin + ahead, end, groups, first_n, N, GROUP, SCALES, BLOCK_N, lined)
            if HAS_ZERO:
                _copy_grids(zeros, zero, ahead, begin + ahead, end, groups, first_n, N, GROUP, SCALES, BLOCK_N, lined)
    for ahead in gl.static_range(3):
        _copy_inputs(inputs[ahead], x, m, begin * UNIT + ahead * SLICE, last, stride_x, wide)
        async_copy.commit_group()
    async_copy.wait_group(2)
    gl.thread_barrier()

    rows: gl.constexpr = gl.SliceLayout(1, left)
    if SCALES == 0:
        grid_n = gl.minimum(first_n + gl.arange(0, BLOCK_N, rows), N - 1)
        if HAS_ZERO:
            row_minus = (-(gl.load(zero + grid_n).to(gl.float32) + MAGIC)).to(HALF)
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, sums)
    before = gl.zeros([BLOCK_N, STEP], HALF, left)
    for unit in range(begin, end):
        place = (unit - begin) % RING
        if FORMAT > 0:
            h0 = scales.index(place * SCALES).load(rows)
            h1 = scales.index(place * SCALES + 1).load(rows)
            h2 = scales.index(place * SCALES + 2).load(rows) if SCALES == 4 else h0
            h3 = scales.index(place * SCALES + 3).load(rows) if SCALES == 4 else h0
            held = (h0, h1, h2, h3)
        for p in gl.static_range(4):
            minus = gl.full([BLOCK_N], -(MAGIC + (1 << (WIDTH - 1))), HALF, rows)
            if FORMAT > 0:
                factor = minus  # not read
            elif SCALES > 0:
                factor = scales.index(place * SCALES + p * SCALES // 4).load(rows)
                if HAS_ZERO:
                    found = zeros.index(place * SCALES + p * SCALES // 4).load(rows)
                    minus = (-(found.to(gl.float32) + MAGIC)).to(HALF)
            else:
                factor = minus
                if HAS_ZERO:
                    minus = row_minus
            tile_words = words.index(place * TILES + p * TILES // 4)
            for q in gl.static_range(SLICE // STEP):
                codes = tile_words.slice(q * STEP, STEP, 1).load(left)
                if FORMAT > 0:
                    found = held[q * SCALES // 4]
                    code, found2 = gl.broadcast(codes, found[:, None])
                    weight = gl.inline_asm_elementwise(
                        DECODE[p], "=r,r,r,r", [code, found2], dtype=x.dtype.element_ty, is_pure=True, pack=2
                    )
                else:
                    code, minus2 = gl.broadcast(codes, minus[:, None])
                    code, factor2 = gl.broadcast(codes, factor[:, None])
                    weight = gl.inline_asm_elementwise(
                        DECODE[p % (16 // WIDTH)], "=r,r,r,r", [code, minus2, factor2], dtype=x.dtype.element_ty,
                        is_pure=True, pack=2,
                    )  # fmt: skip
                # A warp that issues a product waits until the one before it has read its registers. So products are
                # short, and two of them are in flight.
                piece = inputs[p].slice(q * STEP, STEP, 1).permute((1, 0))
                acc = warpgroup_mma(weight, piece, acc, is_async=True)
                acc, before = warpgroup_mma_wait(1, deps=[acc, before])
                before = weight
            if p == 3:
                following = unit + RING
                _copy_codes(words, packed, place, following, end, last_tile, n, stride_tile, WIDTH, wide)
                if FORMAT > 0:
                    _copy_words(scales, scale, place, following, end, first_n, N, SCALES, BLOCK_N, lined)
                elif SCALES > 0:
                    _copy_grids(scales, scale, place, following, end, groups, first_n, N, GROUP, SCALES, BLOCK_N,
                                lined)  # fmt: skip
                    if HAS_ZERO:
                        _copy_grids(zeros, zero, place, following, end, groups, first_n, N, GROUP, SCALES, BLOCK_N,
                                    lined)  # fmt: skip
            async_copy.wait_group(1)
            gl.thread_barrier()
            _copy_inputs(inputs[(p + 3) % 4], x, m, unit * UNIT + (p + 3) * SLICE, last, stride_x, wide)
            async_copy.commit_group()
    acc, before = warpgroup_mma_wait(0, deps=[acc, before])
    async_copy.wait_group(0)
    if FORMAT == 1:
        inside = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, sums)), N - 1)
        acc = acc * (FACTOR / gl.load(zero + inside))[:, None]
    finish(acc, partial, semaphores, scale, bias, out, tile, part, split, first_m, first_n, M, N, SCALES == 0, HAS_BIAS,
           IS_SPLIT)  # fmt: skip
