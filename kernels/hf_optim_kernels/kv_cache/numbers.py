"""Decode one code of each int16 word inside a Triton kernel, two words of a register at once.

A code of up to eight bits in the low bits of a float16 number is that number, a subnormal one: ``code * 2^-24``, which
tensor cores multiply exactly. So masking two words is all there is to it. Of two codes of four bits in a byte, the even
place is masked alone, and the odd one with it: ``even + 16 odd``, from whose sums those of the even place are
subtracted, takes no shift.
``0x6400 | code`` is ``1024 + code``, from which an exact subtraction makes a signed code. The bits of float8 e4m3,
shifted by seven, are those of a float16 number 256 times smaller, subnormal numbers included; GPUs from compute
capability 8.9 on convert two at once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import FP16

# Values of ASM: plain arithmetic; inline assembly; with the conversion of float8.
PLAIN, BITS_ASM, CONVERTING = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def _nibble(place: int) -> str:
    mask = "0x00FF00FF" if place % 2 else "0x000F000F"
    if place < 2:
        return f"and.b32 $0, $1, {mask};"
    if place % 2:
        return "prmt.b32 $0, $1, 0, 0x4341;"
    return f"{{ .reg .b32 t; prmt.b32 t, $1, 0, 0x4341; and.b32 $0, t, {mask}; }}"


def _signed(place: int) -> str:
    # 0x6400 | code is 1024 + code; the high byte of 0x64 comes from a constant.
    number = "prmt.b32 $0, $1, t, 0x4341;" if place else "lop3.b32 $0, $1, 0x00FF00FF, t, 0xEA;"
    high = "0x64646464" if place else "0x64006400"
    return (
        "{ .reg .b32 t, off; "
        + f"mov.b32 t, {high}; {number} "
        + "mov.b32 off, 0xE480E480; add.rn.f16x2 $0, $0, off; }"
    )


def _float8(place: int) -> str:
    sign = "$1" if place else "t"
    shift = "shr.u32 one, $1, 1;" if place else "shl.b32 t, $1, 8; shl.b32 one, $1, 7;"
    body = f"{shift} and.b32 off, one, 0x3F803F80; lop3.b32 $0, {sign}, 0x80008000, off, 0xEA;"
    return "{ .reg .b32 t, one, off; " + body + " }"


def _converted(place: int) -> str:
    pair = "0x0031" if place else "0x0020"
    return (
        "{ .reg .b32 t; .reg .b16 low, high; "
        f"prmt.b32 t, $1, 0, {pair}; mov.b32 {{low, high}}, t; cvt.rn.f16x2.e4m3x2 $0, low; }}"
    )


NIBBLE_0, NIBBLE_1 = tl.constexpr(_nibble(0)), tl.constexpr(_nibble(1))
NIBBLE_2, NIBBLE_3 = tl.constexpr(_nibble(2)), tl.constexpr(_nibble(3))
BYTE_0 = tl.constexpr("and.b32 $0, $1, 0x00FF00FF;")
BYTE_1 = tl.constexpr("prmt.b32 $0, $1, 0, 0x4341;")
SIGNED_0, SIGNED_1 = tl.constexpr(_signed(0)), tl.constexpr(_signed(1))
FLOAT8_0, FLOAT8_1 = tl.constexpr(_float8(0)), tl.constexpr(_float8(1))
CONVERTED_0, CONVERTED_1 = tl.constexpr(_converted(0)), tl.constexpr(_converted(1))

POWER = tl.constexpr("ex2.approx.ftz.f32 $0, $1;")
LOG = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")
RECIPROCAL = tl.constexpr("rcp.approx.ftz.f32 $0, $1;")


@triton.jit
def _run(words, text: tl.constexpr):
    return tl.inline_asm_elementwise(text, "=&r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


def units(bits: int, float8: bool, signed: bool, half: bool, asm: int) -> tuple[float, float]:
    """Return what the ``numbers`` of even and of odd places are multiplied by to be codes.

    Of four bits, numbers of an odd place are less those of the even one before. ``half``: they are float16; ``asm``: a
    value of ASM.
    """
    if float8 and half and asm != CONVERTING.value:
        return 256.0, 256.0
    even = 1.0 if signed or float8 or not half else 2.0**24
    return even, even / 16 if bits == 4 else even


@triton.jit
def numbers(words, PLACE: tl.constexpr, BITS: tl.constexpr, FLOAT8: tl.constexpr, SIGNED: tl.constexpr,
            UNIT: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Return the codes at a place of int16 words over its ``UNIT``, as float16 (float32 unless MATH is FP16).

    Of four bits, an odd place has 16 times its code plus that of the place before, over the ``UNIT`` of that.
    With ``SIGNED``, of 8 bits only, less their offset. Without ``ASM``, plain arithmetic yields the same numbers.
    """
    if ASM == CONVERTING and FLOAT8:
        if PLACE == 0:  # noqa: SIM108
            out = _run(words, CONVERTED_0)
        else:
            out = _run(words, CONVERTED_1)
    elif ASM != PLAIN:
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
        elif SIGNED:
            if PLACE == 0:  # noqa: SIM108
                out = _run(words, SIGNED_0)
            else:
                out = _run(words, SIGNED_1)
        elif PLACE == 0:
            out = _run(words, BYTE_0)
        else:
            out = _run(words, BYTE_1)
    else:
        if BITS == 4 and PLACE % 2 == 1:
            code = (words.to(tl.int32) >> ((PLACE - 1) * BITS)) & 255
        else:
            code = (words.to(tl.int32) >> (PLACE * BITS)) & ((1 << BITS) - 1)
        if FLOAT8:
            out = (((code & 128) << 8) | ((code & 127) << 7)).to(tl.int16).to(tl.float16, bitcast=True)
            if MATH != FP16:
                out = out.to(tl.float32) * 256.0
        else:
            if SIGNED:
                code -= 1 << (BITS - 1)
            PLACE_UNIT: tl.constexpr = UNIT * 16 if BITS == 4 and PLACE % 2 == 1 else UNIT
            out = code.to(tl.float32) * (1.0 / PLACE_UNIT)
            if MATH == FP16:
                out = out.to(tl.float16)
    return out


@triton.jit
def _approximate(x, text: tl.constexpr):
    return tl.inline_asm_elementwise(text, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def power_of_2(x, ASM: tl.constexpr):
    """Return 2^x of float32 numbers, 0 below 2^-126."""
    if ASM != PLAIN:  # noqa: SIM108 - branches of a kernel's types
        out = _approximate(x, POWER)
    else:
        out = tl.exp2(x)
    return out


@triton.jit
def log_2(x, ASM: tl.constexpr):
    """Return log2 of positive float32 numbers from 2^-126 on."""
    if ASM != PLAIN:  # noqa: SIM108
        out = _approximate(x, LOG)
    else:
        out = tl.log2(x)
    return out


@triton.jit
def reciprocal(x, ASM: tl.constexpr):
    """Return 1 / x of float32 numbers between 2^-126 and 2^126."""
    if ASM != PLAIN:  # noqa: SIM108
        out = _approximate(x, RECIPROCAL)
    else:
        out = 1.0 / x
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
