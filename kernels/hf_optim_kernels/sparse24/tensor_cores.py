"""The Triton kernels for codes in the order of sparse tensor cores (``mma_layout`` specifies it).

The tensor cores put the stored numbers at their places, so the arithmetic units only convert codes to numbers: eleven
instructions for sixteen weights. A warp goes over tiles of the weight with one lane for each entry of its tensors:
Triton gives thread ``i`` element ``i`` of a tensor as long as a program has threads, and assembly works on each by
itself. Codes are read a step ahead, all of a step at once.

Pruned columns of the weight take no part in the product: what is not finite there does not reach the output.
"""

from __future__ import annotations

# Triton adds tuples, it does not unpack them in a display; and its tuples grow.
# ruff: noqa: RUF005
# mypy: disable-error-code="assignment"
import triton
import triton.language as tl

from ..common.compute_type import BF16
from ..common.splitk import is_last

FOUR, EIGHT = tl.constexpr((tl.float32,) * 4), tl.constexpr((tl.float32,) * 8)
SIXTEEN, MORE = tl.constexpr((tl.float32,) * 16), tl.constexpr((tl.float32,) * 32)
FOUR_WORDS, SIX_WORDS = tl.constexpr((tl.int32,) * 4), tl.constexpr((tl.int32,) * 6)

# Codes and places of a lane, read once and not cached in L1. $6, $7 addresses.
READ = tl.constexpr(
    "ld.global.nc.L1::no_allocate.L2::256B.v4.b32 {$0, $1, $2, $3}, [$6]; "
    "ld.global.nc.L1::no_allocate.L2::256B.v2.b32 {$4, $5}, [$7];"
)
READ_REGISTERS = tl.constexpr("=r,=r,=r,=r,=r,=r,l,l")
# Inputs of one instruction, $4 their address, as four words and as two pieces of sixteen bytes of which every second
# word is another lane's ($5 selects which); $5 or $6 is zero where there are none.
NARROW = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    "@p ld.global.nc.b32 $0, [$4]; @p ld.global.nc.b32 $1, [$4 + 8]; @p ld.global.nc.b32 $2, [$4 + 16]; "
    "@p ld.global.nc.b32 $3, [$4 + 24]; }"
)
NARROW_EVEN = tl.constexpr(
    "ld.global.nc.b32 $0, [$4]; ld.global.nc.b32 $1, [$4 + 8]; ld.global.nc.b32 $2, [$4 + 16]; "
    "ld.global.nc.b32 $3, [$4 + 24];"
)
WIDE_EVEN = tl.constexpr(
    "{ .reg .pred odd; .reg .b32 a<8>; setp.ne.s32 odd, $5, 0; ld.global.nc.v4.b32 {a0, a1, a2, a3}, [$4]; "
    "ld.global.nc.v4.b32 {a4, a5, a6, a7}, [$4 + 16]; selp.b32 $0, a1, a0, odd; selp.b32 $1, a3, a2, odd; "
    "selp.b32 $2, a5, a4, odd; selp.b32 $3, a7, a6, odd; }"
)
# The same for inputs that ``stage_kernel`` has put in the order of lanes: one piece of sixteen bytes.
STAGED_EVEN = tl.constexpr("ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4];")
STAGED = tl.constexpr(
    "{ .reg .pred p; setp.ne.s32 p, $5, 0; mov.b32 $0, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0; "
    "@p ld.global.nc.v4.b32 {$0, $1, $2, $3}, [$4]; }"
)
# How a lane reads its inputs.
IN_WORDS, IN_PIECES, IN_ORDER = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def step(blocks: int, half: str, selector: int) -> str:
    """Return PTX for one word of codes and ``blocks`` times eight rows of inputs.

    ``$0`` and on: the sums; then the sums so far, the word, the places, minus the zero point as a number of the rows q
    and q + 8 (twice each, in a register), and the inputs.
    """
    one, magic, kind = {"bf16": ("0x3F803F80", "0x43004300", "bf16"), "fp16": ("0x3C003C00", "0x64006400", "f16")}[half]
    sums = 4 * blocks
    word, places, low, high = (f"${2 * sums + i}" for i in range(4))
    lines = [".reg .b32 t, one, a<4>;", f"mov.b32 one, {one};"]
    for register in range(4):
        source = "t" if register else word
        lines += [f"shr.u32 t, {word}, {4 * register};"] if register else []
        lines += [f"lop3.b32 a{register}, {source}, 0x000F000F, {magic}, 0xEA;"]
        lines += [f"fma.rn.{kind}x2 a{register}, a{register}, one, {high if register % 2 else low};"]
    for block in range(blocks):
        d, c, b = (", ".join(f"${first + 4 * block + i}" for i in range(4)) for first in (0, sums, 2 * sums + 4))
        lines += [
            f"mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{kind}.{kind}.f32 "
            f"{{{d}}}, {{a0, a1, a2, a3}}, {{{b}}}, {{{c}}}, {places}, {selector};"
        ]
    return "{ " + " ".join(lines) + " }"


def step_registers(blocks: int) -> str:
    """Return the constraints of the operands of ``step``."""
    return ",".join(["=&f"] * 4 * blocks + ["f"] * 4 * blocks + ["r"] * (4 + 4 * blocks))


@triton.jit
def _minus_zero(zero, at, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, MATH: tl.constexpr):
    """Return minus the number of a zero point, in the biased form of codes, twice in a register."""
    code = tl.load(zero + at).to(tl.int32) if HAS_ZERO else tl.zeros_like(at) + ZERO_OFFSET
    half = code | (0xC300 if MATH == BF16 else 0xE400)
    return half | (half << 16)


@triton.jit
def _read(
    values, bits, scale, zero, unit, first, row, N, units,
    SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, MATH: tl.constexpr,
    TILES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """Load what a lane needs of its column tile ``unit`` and ``TILES`` row tiles, from ``first`` on.

    For each: six words, and for each of the tile's ``GROUPS`` the zeros and scales of the rows ``row`` and ``row + 8``.
    """
    held = ()
    for tile in tl.static_range(TILES):
        at = (first + tile).to(tl.int64) * units * 32 + unit * 32 + tl.arange(0, unit.shape[0]) % 32
        held = held + tl.inline_asm_elementwise(
            READ, READ_REGISTERS, [(values + at * 4).to(tl.int64), (bits + at * 2).to(tl.int64)],
            dtype=SIX_WORDS, is_pure=True, pack=1,
        )  # fmt: skip
        for group in tl.static_range(GROUPS):
            upper = (unit * 128 + group * (128 // GROUPS)) // GROUP * N + row + 16 * tile
            held = held + (_minus_zero(zero, upper, HAS_ZERO, ZERO_OFFSET, MATH),)
            held = held + (_minus_zero(zero, upper + 8, HAS_ZERO, ZERO_OFFSET, MATH),)
            if SCALES == "row":
                held = held + (unit, unit)
            else:
                held = held + (tl.load(scale + upper), tl.load(scale + upper + 8))
    return held


@triton.jit
def _inputs(address, odd, inside, BLOCKS: tl.constexpr, INPUTS: tl.constexpr, GUARD: tl.constexpr):
    """Load four words for each of ``BLOCKS`` times eight rows."""
    words = ()
    for block in tl.static_range(BLOCKS):
        if GUARD:
            words = words + tl.inline_asm_elementwise(
                STAGED if INPUTS == IN_ORDER else NARROW, "=&r,=&r,=&r,=&r,l,r", [address[block], inside],
                dtype=FOUR_WORDS, is_pure=True, pack=1,
            )  # fmt: skip
        elif INPUTS == IN_PIECES:
            words = words + tl.inline_asm_elementwise(
                WIDE_EVEN, "=r,=r,=r,=r,l,r", [address[block], odd], dtype=FOUR_WORDS, is_pure=True, pack=1
            )
        else:
            words = words + tl.inline_asm_elementwise(
                STAGED_EVEN if INPUTS == IN_ORDER else NARROW_EVEN, "=&r,=&r,=&r,=&r,l", [address[block]],
                dtype=FOUR_WORDS, is_pure=True, pack=1,
            )  # fmt: skip
    return words


@triton.jit
def _product(sums, word, places, low, high, inputs, STEP: tl.constexpr, REGISTERS: tl.constexpr, BLOCKS: tl.constexpr):
    """Return ``sums`` plus one instruction for each eight rows."""
    operands = sums + (word, places, low, high) + inputs
    if BLOCKS == 1:
        found = tl.inline_asm_elementwise(STEP, REGISTERS, operands, dtype=FOUR, is_pure=True, pack=1)
    elif BLOCKS == 2:
        found = tl.inline_asm_elementwise(STEP, REGISTERS, operands, dtype=EIGHT, is_pure=True, pack=1)
    elif BLOCKS == 4:
        found = tl.inline_asm_elementwise(STEP, REGISTERS, operands, dtype=SIXTEEN, is_pure=True, pack=1)
    else:
        found = tl.inline_asm_elementwise(STEP, REGISTERS, operands, dtype=MORE, is_pure=True, pack=1)
    return found


@triton.jit
def _nothing(like, COUNT: tl.constexpr):
    zeros = ()
    for _ in tl.static_range(COUNT):
        zeros = zeros + (tl.zeros(like.shape, tl.float32),)
    return zeros


@triton.jit
def _taken(parts, FIRST: tl.constexpr, COUNT: tl.constexpr):
    taken = ()
    for j in tl.static_range(COUNT):
        taken = taken + (parts[FIRST + j],)
    return taken


@triton.jit
def _scaled(sums, part, s0, s1, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Return ``sums`` from ``FIRST`` on plus the sum of a group times its scales."""
    total = ()
    for j in tl.static_range(COUNT):
        total = total + (sums[FIRST + j] + part[j] * (s0 if j % 4 < 2 else s1),)
    return total


@triton.jit
def _add(
    sums, held, address, odd, inside,
    SCALES: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, INPUTS: tl.constexpr,
    GUARD: tl.constexpr, EVEN_STEP: tl.constexpr, ODD_STEP: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """Return ``sums`` plus the products of what ``_read`` loaded; ``address`` is that of the column tile's inputs."""
    COUNT: tl.constexpr = 4 * BLOCKS
    EACH: tl.constexpr = 6 + 4 * GROUPS
    parts = sums if SCALES == "row" else _nothing(odd, COUNT * TILES)
    for i in tl.static_range(4):
        here = ()
        for block in tl.static_range(BLOCKS):
            here = here + (address[block] + (512 if INPUTS == IN_ORDER else 64) * i,)
        inputs = _inputs(here, odd, inside, BLOCKS, INPUTS, GUARD)
        after = ()
        total = ()
        for tile in tl.static_range(TILES):
            part = _product(
                _taken(parts, tile * COUNT, COUNT), held[tile * EACH + i], held[tile * EACH + 4 + i // 2],
                held[tile * EACH + 6 + i * GROUPS // 4 * 4], held[tile * EACH + 7 + i * GROUPS // 4 * 4], inputs,
                EVEN_STEP if i % 2 == 0 else ODD_STEP, REGISTERS, BLOCKS,
            )  # fmt: skip
            if SCALES == "row" or (i + 1) * GROUPS % 4 != 0:
                after = after + part
            else:
                s0 = held[tile * EACH + 8 + i * GROUPS // 4 * 4].to(tl.float32)
                s1 = held[tile * EACH + 9 + i * GROUPS // 4 * 4].to(tl.float32)
                total = total + _scaled(sums, part, s0, s1, tile * COUNT, COUNT)
                after = after + _nothing(odd, COUNT)
        parts = after
        if SCALES != "row" and (i + 1) * GROUPS % 4 == 0:
            sums = total
    return parts if SCALES == "row" else sums


@triton.jit(do_not_specialize=["M"])
def tiles_kernel(
    x, values, bits, scale, zero, bias, out, partial, semaphores, M, N, units,
    SCALES: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr,
    HAS_BIAS: tl.constexpr, GUARD: tl.constexpr, MATH: tl.constexpr, TRIPS: tl.constexpr, TILES: tl.constexpr,
    BLOCKS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, WARPS: tl.constexpr, INPUTS: tl.constexpr,
    EVEN_STEP: tl.constexpr, ODD_STEP: tl.constexpr, REGISTERS: tl.constexpr,
):  # fmt: skip
    """Compute the product for few rows; programs (rows, ``TILES`` row tiles of the weight, split).

    x [M, 128 * units], or as ``stage_kernel`` writes it; values and bits as ``mma_layout.pack`` makes them, scale and
    zero [groups, N], out [M, N], partial float32 [SPLIT, M, N], semaphores int32, a zero for each tile of the output.
    The warps of ``SPLIT`` programs take the column tiles in turns, ``TRIPS`` times ``DEPTH`` each; with ``GUARD``, some
    have one less.
    """
    GROUPS: tl.constexpr = 1 if SCALES == "row" or GROUP >= 128 else 128 // GROUP
    pid_m, first = tl.program_id(0), tl.program_id(1) * TILES
    thread = tl.arange(0, 32 * WARPS)
    warp, quad, place = thread // 32, thread % 32 // 4, thread % 4
    odd, row = place % 2, first * 16 + quad
    unit = tl.program_id(2) * WARPS + warp
    UNIT: tl.constexpr = 2048 if INPUTS == IN_ORDER else 256
    beyond = (units - 1) * UNIT
    rows = ()
    for block in tl.static_range(BLOCKS):
        if INPUTS == IN_ORDER:
            line = (pid_m * BLOCKS + block).to(tl.int64) * (units * 1024)
            rows = rows + ((x + line).to(tl.int64) + thread % 32 * 16,)
        else:
            line = tl.minimum(pid_m * 8 * BLOCKS + 8 * block + quad, M - 1).to(tl.int64) * (units * 128)
            rows = rows + ((x + line).to(tl.int64) + place // 2 * 32 + (0 if INPUTS == IN_PIECES else odd * 4),)
    sums = _nothing(odd, 4 * BLOCKS * TILES)
    held = ()
    for d in tl.static_range(DEPTH):
        now = tl.minimum(unit + d * SPLIT * WARPS, units - 1) if GUARD else unit + d * SPLIT * WARPS
        held = held + (_read(values, bits, scale, zero, now, first, row, N, units,
                             SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, MATH, TILES, GROUPS),)  # fmt: skip
    for _ in range(TRIPS - 1):
        ahead = ()
        for d in tl.static_range(DEPTH):
            now = unit + (DEPTH + d) * SPLIT * WARPS
            now = tl.minimum(now, units - 1) if GUARD else now
            ahead = ahead + (_read(values, bits, scale, zero, now, first, row, N, units,
                                   SCALES, GROUP, HAS_ZERO, ZERO_OFFSET, MATH, TILES, GROUPS),)  # fmt: skip
        for d in tl.static_range(DEPTH):
            here = ()
            for block in tl.static_range(BLOCKS):
                here = here + (rows[block] + unit * UNIT,)
            sums = _add(sums, held[d], here, odd, odd, SCALES, TILES, BLOCKS, GROUPS, INPUTS, False,
                        EVEN_STEP, ODD_STEP, REGISTERS)  # fmt: skip
            unit += SPLIT * WARPS
        held = ahead
    for d in tl.static_range(DEPTH):
        inside = (unit < units).to(tl.int32)
        here = ()
        for block in tl.static_range(BLOCKS):
            here = here + (rows[block] + (tl.minimum(unit * UNIT, beyond) if GUARD else unit * UNIT),)
        sums = _add(sums, held[d], here, odd, inside, SCALES, TILES, BLOCKS, GROUPS, INPUTS, GUARD,
                    EVEN_STEP, ODD_STEP, REGISTERS)  # fmt: skip
        unit += SPLIT * WARPS
    _store(sums, partial, semaphores, bias, scale, out, pid_m, first, M, N,
           SCALES, HAS_BIAS, TILES, BLOCKS, SPLIT, WARPS)  # fmt: skip


@triton.jit
def _over_warps(sums, FIRST: tl.constexpr, WARPS: tl.constexpr):
    """Sum four entries of ``sums`` over warps: [32, 4], the four of a lane contiguous."""
    entries = tl.join(tl.join(sums[FIRST], sums[FIRST + 2]), tl.join(sums[FIRST + 1], sums[FIRST + 3]))
    return tl.sum(tl.reshape(entries, [WARPS, 32, 4]), 0)


@triton.jit
def _store(
    sums, partial, semaphores, bias, scale, out, pid_m, first, M, N,
    SCALES: tl.constexpr, HAS_BIAS: tl.constexpr, TILES: tl.constexpr, BLOCKS: tl.constexpr, SPLIT: tl.constexpr,
    WARPS: tl.constexpr,
):  # fmt: skip
    """Store the sums of all warps; the last program of a tile stores the sums of all programs."""
    lane, entry = tl.arange(0, 32)[:, None], tl.arange(0, 4)[None, :]
    cols = first * 16 + lane // 4 + entry // 2 * 8
    rows = pid_m * 8 * BLOCKS + lane % 4 * 2 + entry % 2
    size, last = M.to(tl.int64) * N, True
    if SPLIT > 1:
        for i in tl.static_range(TILES * BLOCKS):
            row, col = rows + i % BLOCKS * 8, cols + i // BLOCKS * 16
            at = tl.program_id(2) * size + row.to(tl.int64) * N + col
            tl.store(partial + at, _over_warps(sums, 4 * i, WARPS), mask=row < M)
        last = is_last(semaphores, tl.program_id(1) * tl.num_programs(0) + pid_m, SPLIT)
    if last:
        for i in tl.static_range(TILES * BLOCKS):
            row, col = rows + i % BLOCKS * 8, cols + i // BLOCKS * 16
            at = row.to(tl.int64) * N + col
            if SPLIT > 1:
                total = tl.zeros([32, 4], tl.float32)
                for part in range(SPLIT):
                    total += tl.load(partial + part * size + at, mask=row < M, other=0.0, cache_modifier=".cg")
            else:
                total = _over_warps(sums, 4 * i, WARPS)
            if SCALES == "row":
                total *= tl.load(scale + col).to(tl.float32)
            if HAS_BIAS:
                total += tl.load(bias + col).to(tl.float32)
            tl.store(out + at, total.to(out.dtype.element_ty), mask=row < M)


@triton.jit(do_not_specialize=["M"])
def stage_kernel(x, out, M, units):
    """Write inputs [M, 128 * units] in the order of lanes, then rows of zeros; programs (column tiles, eight rows).

    Read in place, eight rows of one column tile would be in as many lines of L1, and in the same banks.
    """
    unit, block = tl.program_id(0), tl.program_id(1)
    word = tl.arange(0, 512)
    part, lane, pair = word // 128, word % 128 // 4, word % 4
    row, place = block * 8 + lane // 4, lane % 4
    source = x.to(tl.pointer_type(tl.int32)) + row.to(tl.int64) * (units * 64) + unit * 64
    found = tl.load(source + part * 16 + place // 2 * 8 + pair * 2 + place % 2, mask=row < M, other=0)
    target = out.to(tl.pointer_type(tl.int32)) + (block.to(tl.int64) * units + unit) * 512
    tl.store(target + word, found)


@triton.jit
def unpack_kernel(
    values, bits, scale, zero, out, N, units,
    GROUP: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Write the dense weight [N, 128 * units] as words of 64 bits; programs (row tiles, column tiles)."""
    tile, unit = tl.program_id(0), tl.program_id(1)
    row, group24 = tl.arange(0, 16)[:, None], tl.arange(0, 32)[None, :]
    half, quad = row // 8, row % 8
    seen = group24 % 4 * 2 + group24 % 8 // 4
    at = (tile.to(tl.int64) * units + unit) * 32 + quad * 4
    codes = tl.load(values + (at + seen % 4) * 4 + group24 // 8) >> (half + seen // 4 * 2) * 4
    places = tl.load(bits + (at + group24 // 8 % 2 * 2 + seen // 4) * 2 + group24 // 16)
    places = places >> (half * 16 + seen % 4 * 4)
    group = (unit * 128 + group24 * 4) // GROUP * N + tile * 16 + row
    scales = tl.load(scale + group).to(tl.float32)
    zeros = tl.load(zero + group).to(tl.float32) if HAS_ZERO else tl.zeros([16, 32], tl.float32) + ZERO_OFFSET
    word = _word((codes & 15).to(tl.float32) - zeros, scales, places & 3, HALF)
    word |= _word(((codes >> 16) & 15).to(tl.float32) - zeros, scales, (places >> 2) & 3, HALF)
    line = (tile * 16 + row).to(tl.int64) * (units * 32)
    tl.store(out.to(tl.pointer_type(tl.int64)) + line + unit * 32 + group24, word)


@triton.jit
def _word(number, scale, place, HALF: tl.constexpr):
    """Return a weight at its place in the word of its 2:4 group."""
    weight = (number * scale).to(HALF).to(tl.int16, bitcast=True)
    return (weight.to(tl.int64) & 0xFFFF) << (place.to(tl.int64) * 16)
