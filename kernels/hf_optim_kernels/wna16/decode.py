"""Convert codes to numbers inside a Triton kernel: two words of a register at once, by masks instead of conversions.

``0x4300 | q`` is the bfloat16 number ``128 + q`` and ``0x6400 | q`` the float16 number ``1024 + q`` for a code ``q`` of
four bits, so one three-input logic instruction yields two numbers. Subtracting is exact. A code of eight bits fits in a
float16 number; for bfloat16, ``128 +`` its low seven bits is one number, and 128 or 256, by the eighth bit, another one
that is subtracted: ``code - 128``.

The bits ``s eem`` of a 4-bit float, moved to the sign and to the two lowest bits of the exponent and the highest of the
mantissa, are a bfloat16 (float16) number that is 2^126 (2^14) times too small: also where ``ee`` is 0, for 0.5 is a
subnormal number then. The multiplication that corrects it is exact. Their places in a word are those of ``float4``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import BF16, FP16

# $0..$3 numbers, $4 words. 0xEA is the truth table of (a & b) | c.
_SPLIT = """
{
.reg .b32 t1, t2, t3;
shr.u32 t1, $4, 4;
shr.u32 t2, $4, 8;
shr.u32 t3, $4, 12;
lop3.b32 $0, $4, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $1, t1, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $2, t2, 0x000F000F, MAGIC, 0xEA;
lop3.b32 $3, t3, 0x000F000F, MAGIC, 0xEA;
"""
_SYMMETRIC = """
{
.reg .b32 one, off;
mov.b32 one, ONE;
mov.b32 off, OFFSET;
fma.rn.TYPE $0, $0, one, off;
fma.rn.TYPE $1, $1, one, off;
fma.rn.TYPE $2, $2, one, off;
fma.rn.TYPE $3, $3, one, off;
}
}
"""
# $0, $1 numbers of the low and the high byte, $2 words.
_BYTES = {
    "bf16": """
{
.reg .b32 t, sign, minus;
shr.u32 t, $2, 8;
mov.b32 minus, 0xBF80BF80;
lop3.b32 $0, $2, 0x007F007F, MAGIC, 0xEA;
lop3.b32 sign, $2, 0x00800080, MAGIC, 0xAE;
fma.rn.TYPE $0, sign, minus, $0;
lop3.b32 $1, t, 0x007F007F, MAGIC, 0xEA;
lop3.b32 sign, t, 0x00800080, MAGIC, 0xAE;
fma.rn.TYPE $1, sign, minus, $1;
}
""",
    "fp16": """
{
.reg .b32 t, one, off;
shr.u32 t, $2, 8;
mov.b32 one, ONE;
mov.b32 off, 0xE480E480;
lop3.b32 $0, $2, 0x00FF00FF, MAGIC, 0xEA;
lop3.b32 $1, t, 0x00FF00FF, MAGIC, 0xEA;
fma.rn.TYPE $0, $0, one, off;
fma.rn.TYPE $1, $1, one, off;
}
""",
}


def _fill(text: str, half: str) -> str:
    # Pairs of numbers: 1, and -(128 + 8) or -(1024 + 8).
    numbers = {
        "bf16": ("bf16x2", "0x43004300", "0x3F803F80", "0xC308C308"),
        "fp16": ("f16x2", "0x64006400", "0x3C003C00", "0xE408E408"),
    }[half]
    for name, value in zip(("TYPE", "MAGIC", "ONE", "OFFSET"), numbers, strict=True):
        text = text.replace(name, value)
    return text


# $0..$3 numbers, $4 words; each slice is up to two shifted words under masks.
_FLOATS = {
    "bf16": """
{
.reg .b32 t, u, big, zero;
and.b32 $0, $4, 0x81C081C0;
shl.b32 t, $4, 3;
and.b32 $1, t, 0x81C081C0;
shl.b32 t, $4, 1;
and.b32 t, t, 0x80008000;
shl.b32 u, $4, 6;
lop3.b32 $2, u, 0x01C001C0, t, 0xEA;
shl.b32 t, $4, 2;
and.b32 t, t, 0x80008000;
shr.u32 u, $4, 3;
lop3.b32 $3, u, 0x01C001C0, t, 0xEA;
mov.b32 big, 0x7E807E80;
""",
    "fp16": """
{
.reg .b32 t, u, big, zero;
and.b32 t, $4, 0x80008000;
shl.b32 u, $4, 3;
lop3.b32 $0, u, 0x0E000E00, t, 0xEA;
and.b32 t, u, 0x80008000;
shl.b32 u, $4, 6;
lop3.b32 $1, u, 0x0E000E00, t, 0xEA;
shl.b32 t, $4, 1;
and.b32 t, t, 0x80008000;
shl.b32 u, $4, 9;
lop3.b32 $2, u, 0x0E000E00, t, 0xEA;
shl.b32 t, $4, 2;
and.b32 t, t, 0x80008000;
lop3.b32 $3, $4, 0x0E000E00, t, 0xEA;
mov.b32 big, 0x74007400;
""",
}
# A negative zero is what a product can be added to unchanged.
_ZERO = """
mov.b32 zero, 0x80008000;
"""
_TO_NUMBER = "".join(f"fma.rn.TYPE ${i}, ${i}, big, zero;\n" for i in range(4))
# $5..$8 are the scales of the four slices, as ``scale_factor`` returns them.
_SCALED = "".join(f"fma.rn.TYPE ${i}, ${i}, ${5 + i}, zero;\n" for i in range(4))
# $5 are the words of four e4m3 scales (and $6 the same). Two of them are moved at once. In bfloat16 the smallest scale
# is 2^13 times what becomes of 0, so that subtracting this changes only the zero.
_SCALED_BY_WORD = """
.reg .b32 even, odd, f;
and.b32 even, $5, 0x00FF00FF;
shr.u32 odd, $5, 8;
and.b32 odd, odd, 0x00FF00FF;
MOVE
prmt.b32 f, even, even, 0x1010;
fma.rn.TYPE $0, $0, f, zero;
prmt.b32 f, odd, odd, 0x1010;
fma.rn.TYPE $1, $1, f, zero;
prmt.b32 f, even, even, 0x3232;
fma.rn.TYPE $2, $2, f, zero;
prmt.b32 f, odd, odd, 0x3232;
fma.rn.TYPE $3, $3, f, zero;
"""
_MOVE = {
    "bf16": """
.reg .b32 one, least;
mov.b32 one, 0x3F803F80;
mov.b32 least, 0xF000F000;
mad.lo.u32 even, even, 16, 0x70007000;
mad.lo.u32 odd, odd, 16, 0x70007000;
fma.rn.TYPE even, even, one, least;
fma.rn.TYPE odd, odd, one, least;
""",
    "fp16": """
shl.b32 even, even, 7;
shl.b32 odd, odd, 7;
""",
}

FOUR_BF16, FOUR_FP16 = tl.constexpr((tl.bfloat16,) * 4), tl.constexpr((tl.float16,) * 4)
TWO_BF16, TWO_FP16 = tl.constexpr((tl.bfloat16,) * 2), tl.constexpr((tl.float16,) * 2)
NIBBLES_BF16 = tl.constexpr(_fill(_SPLIT + _SYMMETRIC, "bf16"))
NIBBLES_FP16 = tl.constexpr(_fill(_SPLIT + _SYMMETRIC, "fp16"))
BYTES_BF16 = tl.constexpr(_fill(_BYTES["bf16"], "bf16"))
BYTES_FP16 = tl.constexpr(_fill(_BYTES["fp16"], "fp16"))
FLOATS_FP16 = tl.constexpr(_fill(_FLOATS["fp16"] + _ZERO + _TO_NUMBER + "}", "fp16"))
NVFP4_BF16 = tl.constexpr(_fill(_FLOATS["bf16"] + _ZERO + _SCALED_BY_WORD.replace("MOVE", _MOVE["bf16"]) + "}", "bf16"))
NVFP4_FP16 = tl.constexpr(_fill(_FLOATS["fp16"] + _ZERO + _SCALED_BY_WORD.replace("MOVE", _MOVE["fp16"]) + "}", "fp16"))
MXFP4_BF16 = tl.constexpr(_fill(_FLOATS["bf16"] + _ZERO + _TO_NUMBER + _SCALED + "}", "bf16"))


@triton.jit
def nibbles(words, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the four slices ``code - 8`` of int16 words, in the shape of the words.

    ``ASM`` uses the instructions above; otherwise plain arithmetic yields the same numbers (float32, interpreter).
    """
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            NIBBLES_BF16 if MATH == BF16 else NIBBLES_FP16, "=&r,=&r,=&r,=&r,r", [words],
            dtype=FOUR_BF16 if MATH == BF16 else FOUR_FP16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide = words.to(tl.int32)
        a = _number(wide & 15, 8, MATH)
        b = _number((wide >> 4) & 15, 8, MATH)
        c = _number((wide >> 8) & 15, 8, MATH)
        d = _number((wide >> 12) & 15, 8, MATH)
    return a, b, c, d


@triton.jit
def bytes_(words, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the two slices ``code - 128`` of int16 words, as ``nibbles``."""
    if ASM:
        a, b = tl.inline_asm_elementwise(
            BYTES_BF16 if MATH == BF16 else BYTES_FP16, "=&r,=&r,r", [words],
            dtype=TWO_BF16 if MATH == BF16 else TWO_FP16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        # In 16 bits, Triton 3.6 generated wrong code for this on an H200.
        wide = words.to(tl.int32)
        a = _number(wide & 255, 128, MATH)
        b = _number((wide >> 8) & 255, 128, MATH)
    return a, b


@triton.jit
def floats(words, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the four slices of 4-bit floats of int16 words, as ``nibbles``; not for bfloat16."""
    if ASM:
        a, b, c, d = tl.inline_asm_elementwise(
            FLOATS_FP16, "=&r,=&r,=&r,=&r,r", [words], dtype=FOUR_FP16, is_pure=True, pack=2
        )
    else:
        a, b, c, d = _plain_floats(words, 1.0, MATH)
    return a, b, c, d


@triton.jit
def scaled_floats(words, scales, FORMAT: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the four slices of 4-bit floats times their scales; ``scales`` are words for each of ``words``.

    Those of NVFP4 are 128 times too small. Every number is exact: it has six bits of mantissa at most.
    """
    if ASM and FORMAT == 1:
        a, b, c, d = tl.inline_asm_elementwise(
            NVFP4_BF16 if MATH == BF16 else NVFP4_FP16, "=&r,=&r,=&r,=&r,r,r,r", [words, scales],
            dtype=FOUR_BF16 if MATH == BF16 else FOUR_FP16, is_pure=True, pack=2,
        )  # fmt: skip
    else:
        # Registers of a row that hold the same scales are one for the compiler, and so is what is computed from them.
        f0 = scale_factor(scales, 0, FORMAT, MATH)
        f1 = scale_factor(scales, 1, FORMAT, MATH)
        f2 = scale_factor(scales, 2, FORMAT, MATH)
        f3 = scale_factor(scales, 3, FORMAT, MATH)
        if ASM:
            a, b, c, d = tl.inline_asm_elementwise(
                MXFP4_BF16, "=&r,=&r,=&r,=&r,r,r,r,r,r", [words, f0, f1, f2, f3], dtype=FOUR_BF16, is_pure=True, pack=2
            )
        else:
            a, b, c, d = _plain_floats(words, 2.0**-14 if MATH == FP16 else 1.0, MATH)
            a, b, c, d = a * f0, b * f1, c * f2, d * f3
    return a, b, c, d


@triton.jit
def _plain_floats(words, factor: tl.constexpr, MATH: tl.constexpr):
    wide = words.to(tl.int32)
    a = _float(wide >> 6, wide >> 15, factor, MATH)
    b = _float(wide >> 3, wide >> 12, factor, MATH)
    c = _float(wide, wide >> 14, factor, MATH)
    d = _float(wide >> 9, wide >> 13, factor, MATH)
    return a, b, c, d


@triton.jit
def _float(magnitude, sign, factor: tl.constexpr, MATH: tl.constexpr):
    """Return ``factor`` times the number of an e2m1 magnitude (three low bits) and a sign (lowest bit)."""
    bits = magnitude & 7
    # Twice the number: 0, 1 below the first power of two, then (2 + m) 2^(e - 1).
    doubled = tl.where(bits < 2, bits, (2 | (bits & 1)) << (tl.maximum(bits >> 1, 1) - 1))
    number = doubled.to(tl.float32) * tl.where((sign & 1) == 1, -0.5 * factor, 0.5 * factor)
    return number.to(tl.float16) if MATH == FP16 else number


@triton.jit
def scale_factor(words, slice: tl.constexpr, FORMAT: tl.constexpr, MATH: tl.constexpr):
    """Return the scales of a slice from their words (``float4``), by which ``scaled_floats`` multiplies.

    Of NVFP4 they are 2^7 (float16) or 2^-7 times the scales. With the power of two by which the bits of a pattern are
    too small, float16 leaves the 128 of ``scaled_floats``, too.
    """
    byte = (words >> (8 * slice)) & 255
    if MATH == FP16:
        factor = (byte << 7).to(tl.int16).to(tl.float16, bitcast=True)
    elif MATH == BF16:
        # The exponent of float32 and bfloat16 has the bias of e8m0; 2^-127 is a subnormal number there.
        factor = tl.maximum(byte << 7, 0x40).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        bits = tl.maximum(byte << 23, 0x400000) if FORMAT == 2 else tl.where(byte == 0, 0, (byte << 20) + (98 << 23))
        factor = bits.to(tl.float32, bitcast=True)
    return factor


@triton.jit
def _number(codes, zero_offset: tl.constexpr, MATH: tl.constexpr):
    number = (codes - zero_offset).to(tl.float32)
    if MATH == BF16:
        number = number.to(tl.bfloat16)
    elif MATH == FP16:
        number = number.to(tl.float16)
    return number
