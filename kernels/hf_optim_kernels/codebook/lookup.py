"""Convert codes to numbers inside a Triton kernel: a table of up to 16 numbers of 16 bits, held in registers.

``prmt`` selects four bytes of eight by the four nibbles of a selector. The low bytes of eight numbers fill two
registers, the high bytes two more: a selector built from the codes of four columns gives their low bytes in one
instruction and their high bytes in another. Each bit of a code is in a separate word, at the same position: a shift and
a mask per bit build the selectors of eight columns, four from each of two words. A table of sixteen is looked up in
both halves, and the fourth bit, spread over a byte by ``prmt``'s sign mode, selects the half.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.compute_type import BF16, FP32

# Bits of a code whose table fits into registers.
MOST_BITS = 4
_ONES = 0x11111111


def tables(centroids: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the bytes of up to 16 centroids in a 16-bit ``dtype``: int32 [8], low bytes by fours, then high bytes."""
    found = torch.zeros(16, dtype=torch.int32, device=centroids.device)
    found[: len(centroids)] = centroids.to(dtype).view(torch.int16).to(torch.int32) & 0xFFFF
    shifts = torch.arange(0, 32, 8, device=centroids.device)
    parts = [((half.view(4, 4).long() << shifts).sum(1)) for half in (found & 255, found >> 8)]
    both = torch.cat(parts)
    return torch.where(both >= 1 << 31, both - (1 << 32), both).to(torch.int32)


def _shifted(register: str, source: str, shift: int) -> str:
    if shift < 0:
        return f"shl.b32 {register}, {source}, {-shift};"
    return f"shr.u32 {register}, {source}, {shift};" if shift else f"mov.b32 {register}, {source};"


def text(bits: int, first: int) -> str:
    """Return PTX that decodes the slices ``first``, + 4, + 8 and + 12 of a pair of words.

    $0 to $3 are pairs of numbers; from $4 on follow ``bits`` pairs of words, then the table, each register twice.
    """
    table = [f"${4 + bits + 2 * i}" for i in range(8)]
    lines = [
        "{",
        ".reg .b32 a, sel, top, la, lb, ha, hb, lc, ld, hc, hd, ma, mb, t, u;",
        _shifted("a", "$4", first),
        f"and.b32 sel, a, {_ONES:#x};",
    ]
    for bit in range(1, min(bits, 3)):
        lines += [_shifted("a", f"${4 + bit}", first - bit), f"lop3.b32 sel, a, {_ONES << bit:#x}, sel, 0xEA;"]
    lines += [
        "shr.u32 t, sel, 16;",
        f"prmt.b32 la, {table[0]}, {table[1]}, sel;",
        f"prmt.b32 lb, {table[0]}, {table[1]}, t;",
        f"prmt.b32 ha, {table[4]}, {table[5]}, sel;",
        f"prmt.b32 hb, {table[4]}, {table[5]}, t;",
    ]
    if bits == MOST_BITS:
        lines += [
            f"prmt.b32 lc, {table[2]}, {table[3]}, sel;",
            f"prmt.b32 ld, {table[2]}, {table[3]}, t;",
            f"prmt.b32 hc, {table[6]}, {table[7]}, sel;",
            f"prmt.b32 hd, {table[6]}, {table[7]}, t;",
            _shifted("a", "$7", first),
            f"and.b32 top, a, {_ONES:#x};",
            # Nibble 0 selects byte 0 of 0x8000, nibble 9 the sign of byte 1, eight times.
            "mul.lo.u32 top, top, 9;",
            "shr.u32 t, top, 16;",
            "mov.b32 u, 0x8000;",
            "prmt.b32 ma, u, u, top;",
            "prmt.b32 mb, u, u, t;",
            "lop3.b32 la, ma, lc, la, 0xCA;",
            "lop3.b32 lb, mb, ld, lb, 0xCA;",
            "lop3.b32 ha, ma, hc, ha, 0xCA;",
            "lop3.b32 hb, mb, hd, hb, 0xCA;",
        ]
    for low, order in ((0, "0x5140"), (2, "0x7362")):
        lines += [
            f"prmt.b32 t, la, lb, {order};",
            f"prmt.b32 u, ha, hb, {order};",
            f"prmt.b32 ${low}, t, u, 0x5140;",
            f"prmt.b32 ${low + 1}, t, u, 0x7362;",
        ]
    return "\n".join([*lines, "}"])


def constraints(bits: int) -> str:
    """Return the constraints of the operands of ``text``."""
    return ",".join(["=&r"] * 4 + ["r"] * (bits + 16))


FOUR_BF16, FOUR_FP16 = tl.constexpr((tl.bfloat16,) * 4), tl.constexpr((tl.float16,) * 4)
T20, T21, T22, T23 = (tl.constexpr(text(2, first)) for first in range(4))
T30, T31, T32, T33 = (tl.constexpr(text(3, first)) for first in range(4))
T40, T41, T42, T43 = (tl.constexpr(text(4, first)) for first in range(4))
C2, C3, C4 = (tl.constexpr(constraints(bits)) for bits in (2, 3, 4))


@triton.jit
def _code(w0, w1, w2, w3, w4, w5, w6, w7, p: tl.constexpr, BITS: tl.constexpr):
    code = (w0.to(tl.int32) >> p) & 1
    code |= ((w1.to(tl.int32) >> p) & 1) << 1
    if BITS > 2:
        code |= ((w2.to(tl.int32) >> p) & 1) << 2
    if BITS > 3:
        code |= ((w3.to(tl.int32) >> p) & 1) << 3
    if BITS > 4:
        code |= ((w4.to(tl.int32) >> p) & 1) << 4
    if BITS > 5:
        code |= ((w5.to(tl.int32) >> p) & 1) << 5
    if BITS > 6:
        code |= ((w6.to(tl.int32) >> p) & 1) << 6
    if BITS > 7:
        code |= ((w7.to(tl.int32) >> p) & 1) << 7
    return code


@triton.jit
def _number(table, code, MATH: tl.constexpr):
    value = tl.load(table + code)
    return value.to(tl.float32) if MATH == FP32 else value


@triton.jit
def four_slices(
    words, table, r0, r1, r2, r3, r4, r5, r6, r7,
    FIRST: tl.constexpr, BITS: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Return the numbers of the slices FIRST, + 4, + 8, + 12 of the first BITS of eight ``words``.

    ``ASM`` uses ``text`` and the table in ``r0`` to ``r7``; else numbers are loaded from ``table``.
    """
    w0, w1, w2, w3, w4, w5, w6, w7 = words
    if ASM:
        DTYPE: tl.constexpr = FOUR_BF16 if MATH == BF16 else FOUR_FP16
        if BITS == 2:
            TEXT: tl.constexpr = T20 if FIRST == 0 else T21 if FIRST == 1 else T22 if FIRST == 2 else T23
            a, b, c, d = tl.inline_asm_elementwise(
                TEXT, C2, [w0, w1, r0, r1, r2, r3, r4, r5, r6, r7], dtype=DTYPE, is_pure=True, pack=2
            )
        elif BITS == 3:
            TEXT: tl.constexpr = T30 if FIRST == 0 else T31 if FIRST == 1 else T32 if FIRST == 2 else T33  # type: ignore[no-redef]
            a, b, c, d = tl.inline_asm_elementwise(
                TEXT, C3, [w0, w1, w2, r0, r1, r2, r3, r4, r5, r6, r7], dtype=DTYPE, is_pure=True, pack=2
            )
        else:
            TEXT: tl.constexpr = T40 if FIRST == 0 else T41 if FIRST == 1 else T42 if FIRST == 2 else T43  # type: ignore[no-redef]
            a, b, c, d = tl.inline_asm_elementwise(
                TEXT, C4, [w0, w1, w2, w3, r0, r1, r2, r3, r4, r5, r6, r7], dtype=DTYPE, is_pure=True, pack=2
            )
    else:
        a = _number(table, _code(w0, w1, w2, w3, w4, w5, w6, w7, FIRST, BITS), MATH)
        b = _number(table, _code(w0, w1, w2, w3, w4, w5, w6, w7, FIRST + 4, BITS), MATH)
        c = _number(table, _code(w0, w1, w2, w3, w4, w5, w6, w7, FIRST + 8, BITS), MATH)
        d = _number(table, _code(w0, w1, w2, w3, w4, w5, w6, w7, FIRST + 12, BITS), MATH)
    return a, b, c, d
