"""The kernel of ``hf_optim::sparse24`` for 16-bit weights and some dozens of rows or more (Gluon; Hopper).

As ``wna16.wide_kernel``: the weight is the left operand of warp-group instructions, put together in registers while the
product of the slice before runs. Inputs are read in the order of ``stage_kernel``, in which column ``j`` of 32 2:4
groups is contiguous, so that nothing is interleaved.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..common.wide_tile import finish

PIECE = gl.constexpr(32)
UNIT = gl.constexpr(256)
STEP = gl.constexpr(16)


def _select(high: bool, second: bool) -> str:
    """Return PTX for four groups: words $4..$7 and their bits $8 to columns 0 and 1, or 2 and 3: $0, $1 and $2, $3.

    Masks as in ``triton_helpers``.
    """
    lines = [".reg .b32 a, b, s, t, v, w, m, n;"]
    shifts = [(3 if high else 7) - place for place in range(4)]
    outer, inner = (3, 2) if second else (0, 1)
    lines += [f"shl.b32 s, $8, {shifts[outer]};", f"shl.b32 t, $8, {shifts[inner]};"]
    for pair, selector in enumerate(("0x9988", "0xBBAA")):
        x, y = f"${4 + 2 * pair}", f"${5 + 2 * pair}"
        lines += [f"prmt.b32 v, {x}, {y}, 0x5410;", f"prmt.b32 w, {x}, {y}, 0x7632;"]
        lines += [f"prmt.b32 m, s, 0, {selector};", f"prmt.b32 n, t, 0, {selector};"]
        own, other = ("w", "v") if second else ("v", "w")
        first, last = f"${pair}", f"${2 + pair}"
        if second:
            first, last = last, first
        lines += [f"and.b32 {first}, {own}, m;", f"lop3.b32 a, m, {other}, {own}, 0xCA;", f"and.b32 {last}, a, n;"]
    return "{ " + " ".join(lines) + " }"


SELECT = tuple(_select(high, second) for high in (False, True) for second in (False, True))
REGISTERS = gl.constexpr("=&r,=&r,=&r,=&r,r,r,r,r,r")


@triton.jit
def stage_kernel(x, out, K, stride_x, width):
    """Write out [M, width]: of every 256 columns of ``x`` [M, K], in pieces of 32, first columns 0, 4, 8, ..., then 1.

    Columns beyond K are zeros. Programs (units of 256 columns, rows).
    """
    row, unit = tl.program_id(1).to(tl.int64), tl.program_id(0)
    half, column, group = (
        tl.arange(0, 2)[:, None, None],
        tl.arange(0, 4)[None, :, None],
        tl.arange(0, 32)[None, None, :],
    )
    source = unit * 256 + half * 128 + group * 4 + column
    target = unit * 256 + half * 128 + column * 32 + group
    tl.store(out + row * width + target, tl.load(x + row * stride_x + source, source < K, 0.0))


@gluon.jit
def _copy_inputs(buffers, x, rows, first, last, width, LAYOUT: gl.constexpr):
    columns = gl.arange(0, PIECE, gl.SliceLayout(0, LAYOUT))
    for piece in gl.static_range(2):
        at = x + rows.to(gl.int64)[:, None] * width + (first + piece * PIECE) + columns[None, :]
        inside = (rows[:, None] >= 0) & (columns[None, :] < last - first)
        async_copy.async_copy_global_to_shared(buffers.index(piece), at, mask=inside)


@gluon.jit
def _copy_weight(words, marks, values, bits, place, unit, end, word_rows, mark_rows, stored,
                 WORDS: gl.constexpr, MARKS: gl.constexpr):  # fmt: skip
    group = gl.arange(0, PIECE, gl.SliceLayout(0, WORDS))
    inside = (word_rows[:, None] >= 0) & (group[None, :] < (end - unit) * PIECE)
    for half in gl.static_range(2):
        at = values + word_rows.to(gl.int64)[:, None] * stored + (unit * 2 * PIECE + half * PIECE) + group[None, :]
        async_copy.async_copy_global_to_shared(words.index(place * 2 + half), at, mask=inside)
    byte = gl.arange(0, PIECE, gl.SliceLayout(0, MARKS))
    there = (mark_rows[:, None] >= 0) & (byte[None, :] < (end - unit) * PIECE)
    at = bits + mark_rows.to(gl.int64)[:, None] * (stored // 2) + unit * PIECE + byte[None, :]
    async_copy.async_copy_global_to_shared(marks.index(place), at, mask=there)


@gluon.jit(do_not_specialize=["M", "split"])
def wide_kernel(
    x, values, bits, bias, out, partial, semaphores, M, N, stored, split,
    HAS_BIAS: gl.constexpr, SELECT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, IS_SPLIT: gl.constexpr,
    RING: gl.constexpr,
):  # fmt: skip
    """Compute tiles of out [M, N]; programs (rows fastest, then columns; split).

    x [M, 4 * stored] as ``stage_kernel`` writes it, values int32 [N, stored], bits uint8 [N, stored / 2]; ``stored`` is
    a multiple of 64. ``SELECT`` has the assembly.
    """
    HALF: gl.constexpr = x.dtype.element_ty
    WARPS: gl.constexpr = gl.num_warps()
    down = gl.cdiv(M, BLOCK_M)
    tile, part = gl.program_id(0), gl.program_id(1)
    first_m, first_n = tile % down * BLOCK_M, tile // down * BLOCK_N

    sums: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_M, 16])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    x_lines: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [WARPS, 1], [1, 0])
    w_lines: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS, 1], [1, 0])
    b_lines: gl.constexpr = gl.BlockedLayout([1, 16], [16, 2], [WARPS, 1], [1, 0])
    swizzled: gl.constexpr = gl.NVMMASharedLayout(64, 16, 2)
    spread: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [1, 0])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])

    x0 = gl.allocate_shared_memory(HALF, [2, BLOCK_M, PIECE], swizzled)
    x1 = gl.allocate_shared_memory(HALF, [2, BLOCK_M, PIECE], swizzled)
    x2 = gl.allocate_shared_memory(HALF, [2, BLOCK_M, PIECE], swizzled)
    x3 = gl.allocate_shared_memory(HALF, [2, BLOCK_M, PIECE], swizzled)
    inputs = (x0, x1, x2, x3)
    words = gl.allocate_shared_memory(gl.int32, [RING * 2, BLOCK_N, PIECE], spread)
    marks = gl.allocate_shared_memory(gl.uint8, [RING, BLOCK_N, PIECE], plain)

    # Rows beyond the end repeat the last one; they are not stored.
    m = gl.minimum(first_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, x_lines)), M - 1)
    n = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, w_lines)), N - 1)
    b = gl.minimum(first_n + gl.arange(0, BLOCK_N, gl.SliceLayout(1, b_lines)), N - 1)
    width = 4 * stored
    units = width // UNIT
    each = gl.cdiv(units, split)
    begin = part * each
    end = gl.minimum(begin + each, units)
    gl.assume(begin < end)  # else registers of sums would be set where products are in flight
    last = end * UNIT

    for ahead in gl.static_range(RING):
        _copy_weight(words, marks, values, bits, ahead, begin + ahead, end, n, b, stored, w_lines, b_lines)
    for ahead in gl.static_range(3):
        _copy_inputs(inputs[ahead], x, m, begin * UNIT + ahead * 64, last, width, x_lines)
        async_copy.commit_group()
    async_copy.wait_group(2)
    gl.thread_barrier()

    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, sums)
    before = gl.zeros([BLOCK_N, STEP], HALF, left)
    for unit in range(begin, end):
        place = (unit - begin) % RING
        for p in gl.static_range(4):
            for q in gl.static_range(PIECE // STEP):
                word = words.index(place * 2 + p // 2).slice(q * STEP, STEP, 1).load(left)
                mark = marks.index(place).slice(q * STEP, STEP, 1).load(left)
                first, second = gl.inline_asm_elementwise(
                    SELECT[p], REGISTERS, [word, mark], dtype=(x.dtype.element_ty, x.dtype.element_ty), is_pure=True,
                    pack=4,
                )  # fmt: skip
                # Two products are in flight; the older one reads ``before``.
                acc = warpgroup_mma(
                    first, inputs[p].index(0).slice(q * STEP, STEP, 1).permute((1, 0)), acc, is_async=True
                )
                acc, before = warpgroup_mma_wait(1, deps=[acc, before])
                acc = warpgroup_mma(
                    second, inputs[p].index(1).slice(q * STEP, STEP, 1).permute((1, 0)), acc, is_async=True
                )
                acc, first = warpgroup_mma_wait(1, deps=[acc, first])
                before = second
            if p == 3:
                following = unit + RING
                _copy_weight(words, marks, values, bits, place, following, end, n, b, stored, w_lines, b_lines)
            async_copy.wait_group(1)
            gl.thread_barrier()
            _copy_inputs(inputs[(p + 3) % 4], x, m, unit * UNIT + (p + 3) * 64, last, width, x_lines)
            async_copy.commit_group()
    acc, before = warpgroup_mma_wait(0, deps=[acc, before])
    async_copy.wait_group(0)
    finish(
        acc, partial, semaphores, bias, bias, out, tile, part, split, first_m, first_n, M, N, False, HAS_BIAS, IS_SPLIT
    )
