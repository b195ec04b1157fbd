"""Decode one code of each int16 word inside a Triton kernel, two words of a register at once.

``0x6400 | q`` is the float16 number ``1024 + q`` for a code ``q`` of up to eight bits, so a three-input logic
instruction and a subtraction, which is exact, yield two numbers. A high half byte stands for ``1024 + 16 q``, which one
multiply-add brings back. The bits of float8 e4m3, shifted by seven, are those of a float16 number 256 times smaller,
subnormal numbers included.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP16

_OR = "lop3.b32 $0, {word}, {mask}, 0x64006400, 0xEA;"
_SHIFTED = "shr.u32 t, $1, 8;"
_ADD = "mov.b32 off, {off}; add.rn.f16x2 $0, $0, off;"
_FMA = "mov.b32 one, 0x2C002C00; mov.b32 off, 0xD480D480; fma.rn.f16x2 $0, $0, one, off;"


def _asm(body: str) -> str:
    return "{ .reg .b32 t, one, off; " + body + " }"


def _nibble(place: int) -> str:
    word, first = ("t", _SHIFTED) if place > 1 else ("$1", "")
    if place % 2:
        return _asm(first + _OR.format(word=word, mask="0x00F000F0") + _FMA)
    return _asm(first + _OR.format(word=word, mask="0x000F000F") + _ADD.format(off="0xE408E408"))


def _byte(place: int) -> str:
    word, first = ("t", _SHIFTED) if place else ("$1", "")
    return _asm(first + _OR.format(word=word, mask="0x00FF00FF") + _ADD.format(off="0xE480E480"))


def _float8(place: int) -> str:
    sign = "$1" if place else "t"
    shift = "shr.u32 one, $1, 1;" if place else "shl.b32 t, $1, 8; shl.b32 one, $1, 7;"
    return _asm(shift + f"and.b32 off, one, 0x3F803F80; lop3.b32 $0, {sign}, 0x80008000, off, 0xEA;")


NIBBLE_0, NIBBLE_1 = tl.constexpr(_nibble(0)), tl.constexpr(_nibble(1))
NIBBLE_2, NIBBLE_3 = tl.constexpr(_nibble(2)), tl.constexpr(_nibble(3))
BYTE_0, BYTE_1 = tl.constexpr(_byte(0)), tl.constexpr(_byte(1))
FLOAT8_0, FLOAT8_1 = tl.constexpr(_float8(0)), tl.constexpr(_float8(1))


@triton.jit
def _run(words, text: tl.constexpr):
    return tl.inline_asm_elementwise(text, "=&r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def numbers(words, PLACE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, MATH: tl.constexpr,
            ASM: tl.constexpr):  # fmt: skip
    """Return ``code - offset`` of the codes at a place of int16 words, as float16 (float32 unless MATH is FP16).

    For float8, the number divided by 256. Without ``ASM``, plain arithmetic yields the same numbers.
    """
    if ASM:
        if BITS == 4:
            if PLACE == 0:
                out = _run(words, NIBBLE_0)
            elif PLACE == 1:
                out = _run(words, NIBBLE_1)
            elif PLACE == 2:
                out = _run(words, NIBBLE_2)
            else:
                out = _run(words, NIBBLE_3)
        elif FLOAT8:
            if PLACE == 0:  # noqa: SIM108
                out = _run(words, FLOAT8_0)
            else:
                out = _run(words, FLOAT8_1)
        elif PLACE == 0:
            out = _run(words, BYTE_0)
        else:
            out = _run(words, BYTE_1)
    else:
        code = (words.to(tl.int32) >> (PLACE * BITS)) & ((1 << BITS) - 1)
        if FLOAT8:
            out = (((code & 128) << 8) | ((code & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
        else:
            out = (code - (1 << (BITS - 1))).to(tl.float16)
        if MATH != FP16:
            out = out.to(tl.float32)
    return out


@triton.jit
def multiply(numbers_, factor, ASM: tl.constexpr):
    """Return numbers [SUB, DP] times one factor for each column, in their dtype."""
    factors = tl.broadcast_to(factor[None, :], numbers_.shape)
    if ASM:
        out = tl.inline_asm_elementwise(
            "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [numbers_, factors], dtype=tl.float16, is_pure=True, pack=2
        )
    else:
        out = numbers_ * factors
    return out


@triton.jit
def multiply_add(numbers_, factor, term, ASM: tl.constexpr):
    """Return numbers [SUB, DP] times a factor plus a term for each column, in their dtype."""
    factors = tl.broadcast_to(factor[None, :], numbers_.shape)
    terms = tl.broadcast_to(term[None, :], numbers_.shape)
    if ASM:
        out = tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;", "=r,r,r,r", [numbers_, factors, terms], dtype=tl.float16, is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        out = numbers_ * factors + terms
    return out


@triton.jit
def rounded(x):
    """Return ``x`` rounded to a whole number, ties to even, for magnitudes below 2^22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def float8_code(x):
    """Return the e4m3 code (int32) of float32 numbers of magnitude up to 448, rounded to nearest, ties to even."""
    size = tl.abs(x)
    exponent = tl.maximum((size.to(tl.int32, bitcast=True) >> 23) - 127, -6)
    # Adding 1.5 * 2^23 steps rounds to a multiple of the step, 2^(exponent - 3).
    big = ((exponent + 20 + 127) << 23).to(tl.float32, bitcast=True) * 1.5
    size = (size + big) - big
    bits = (size * 0.00390625).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) >> 7
    return tl.where(x < 0, bits | 128, bits)
