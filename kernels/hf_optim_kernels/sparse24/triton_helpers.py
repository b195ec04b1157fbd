"""Device functions of the kernels: convert stored numbers to the four weights of their 2:4 group.

Tensors of weights are [BLOCK_N, GROUPS24], one for each of the four columns of a group: column ``p`` of all groups is
then one matrix product with every fourth input, and nothing is interleaved. Masks made of a group's bits decide where
its numbers go: with bits ``b0 .. b3`` set for the two columns that are stored as ``v0, v1``,

    w0 = b0 v0,    w1 = b1 (b0 ? v1 : v0),    w2 = b2 (b3 ? v0 : v1),    w3 = b3 v1
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.compute_type import BF16, FP16, FP32


def _select(high: bool) -> str:
    """Return PTX for four stored groups in a thread: registers hold two numbers of 16 bits, and the bits of all four.

    A mask of two numbers is one byte permutation that repeats the signs of two bytes, after a shift that brings the
    wanted bit of each byte to its sign. 28 instructions for 16 weights.
    """
    lines = [".reg .b32 s0, s1, s2, s3, m0, m1, m2, m3, t;"]
    lines += [f"shl.b32 s{p}, $12, {(3 if high else 7) - p};" for p in range(4)]
    for pair, selector in enumerate(("0x9988", "0xBBAA")):
        w = [f"${2 * p + pair}" for p in range(4)]
        v0, v1 = f"${8 + pair}", f"${10 + pair}"
        lines += [f"prmt.b32 m{p}, s{p}, 0, {selector};" for p in range(4)]
        lines += [
            f"and.b32 {w[0]}, {v0}, m0;",
            f"lop3.b32 t, m0, {v1}, {v0}, 0xCA;",
            f"and.b32 {w[1]}, t, m1;",
            f"lop3.b32 t, m3, {v0}, {v1}, 0xCA;",
            f"and.b32 {w[2]}, t, m2;",
            f"and.b32 {w[3]}, {v1}, m3;",
        ]
    return "{ " + " ".join(lines) + " }"


SELECT_LOW, SELECT_HIGH = tl.constexpr(_select(False)), tl.constexpr(_select(True))
SELECT_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r,r,r,r")


@triton.jit
def _where(v0, v1, bits, HIGH: tl.constexpr):
    """Return ``place`` without assembly, for numbers of any type."""
    b = bits.to(tl.int32) >> (4 * HIGH)
    b0, b1, b2, b3 = (b & 1) != 0, (b & 2) != 0, (b & 4) != 0, (b & 8) != 0
    none = tl.zeros_like(v0)
    w0, w3 = tl.where(b0, v0, none), tl.where(b3, v1, none)
    w1 = tl.where(b1, tl.where(b0, v1, v0), none)
    w2 = tl.where(b2, tl.where(b3, v0, v1), none)
    return w0, w1, w2, w3


@triton.jit
def place(v0, v1, bits, HIGH: tl.constexpr, MATH: tl.constexpr, ASM: tl.constexpr):
    """Return the weights of columns 0 to 3 of 2:4 groups. ``bits`` uint8; ``HIGH``: they are in its upper half."""
    if ASM:
        first, second = v0.to(tl.int16, bitcast=True), v1.to(tl.int16, bitcast=True)
        i0, i1, i2, i3 = tl.inline_asm_elementwise(
            SELECT_HIGH if HIGH else SELECT_LOW, SELECT_REGISTERS, [first, second, bits],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=4,
        )  # fmt: skip
        if MATH == BF16:
            w0, w1 = i0.to(tl.bfloat16, bitcast=True), i1.to(tl.bfloat16, bitcast=True)
            w2, w3 = i2.to(tl.bfloat16, bitcast=True), i3.to(tl.bfloat16, bitcast=True)
        else:
            w0, w1 = i0.to(tl.float16, bitcast=True), i1.to(tl.float16, bitcast=True)
            w2, w3 = i2.to(tl.float16, bitcast=True), i3.to(tl.float16, bitcast=True)
    else:
        w0, w1, w2, w3 = _where(v0, v1, bits, HIGH)
    return w0, w1, w2, w3


@triton.jit
def as_number(half, MATH: tl.constexpr):
    """Return sixteen bits (int16) as a number of the kernel's type; for ``FP32`` they are those of a bfloat16."""
    if MATH == BF16:
        number = half.to(tl.bfloat16, bitcast=True)
    elif MATH == FP16:
        number = half.to(tl.float16, bitcast=True)
    else:
        number = (half.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _above_zero(codes, zero, WIDTH: tl.constexpr, MATH: tl.constexpr):
    """Return codes (int16) minus ``zero`` (float32, whole numbers), exact in the kernel's type."""
    if MATH == FP16:
        # 0x6400 | q is the float16 number 1024 + q: bits instead of a conversion.
        number = (codes | 0x6400).to(tl.float16, bitcast=True) - (zero + 1024).to(tl.float16)
    elif MATH == FP32:
        number = codes.to(tl.float32) - zero
    elif WIDTH == 4:
        # 0x4300 | q is the bfloat16 number 128 + q.
        number = (codes | 0x4300).to(tl.bfloat16, bitcast=True) - (zero + 128).to(tl.bfloat16)
    else:
        # 0x4B000000 | q is the float32 number 2^23 + q.
        wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
        number = (wide - (zero + 8388608)).to(tl.bfloat16)
    return number


@triton.jit
def scaled(number, scale, MATH: tl.constexpr):
    """Return ``number * scale`` (float32), rounded to the kernel's type."""
    product = number.to(tl.float32) * scale
    if MATH == BF16:
        product = product.to(tl.bfloat16)
    elif MATH == FP16:
        product = product.to(tl.float16)
    return product


@triton.jit
def stored_pair(values, at, WIDTH: tl.constexpr):
    """Return the two numbers of the 2:4 groups ``at``, as int16: bits of a weight, or codes."""
    if WIDTH == 16:
        word = tl.load(values.to(tl.pointer_type(tl.int32)) + at)
        v0, v1 = (word & 0xFFFF).to(tl.int16), (word >> 16).to(tl.int16)
    elif WIDTH == 8:
        word = tl.load(values.to(tl.pointer_type(tl.int16)) + at)
        v0, v1 = word & 0xFF, (word >> 8) & 0xFF
    else:
        word = tl.load(values + at)
        v0, v1 = (word & 15).to(tl.int16), (word >> 4).to(tl.int16)
    return v0, v1


@triton.jit
def numbers(
    values, at, scale, zero, group_at,
    WIDTH: tl.constexpr, SCALES: tl.constexpr, HAS_ZERO: tl.constexpr, ZERO_OFFSET: tl.constexpr, MATH: tl.constexpr,
):  # fmt: skip
    """Return the two stored numbers of the 2:4 groups ``at``, in the kernel's type.

    With ``SCALES`` "each" they are multiplied by their scales; else codes are whole numbers, exact in 16 bits, and
    the sum of their products is scaled. ``group_at`` [BLOCK_N, 1 or GROUPS24] is where scale and zero point are.
    """
    v0, v1 = stored_pair(values, at, WIDTH)
    if WIDTH == 16:
        v0, v1 = as_number(v0, MATH), as_number(v1, MATH)
    else:
        zeros = tl.load(zero + group_at).to(tl.float32) if HAS_ZERO else tl.full([1, 1], ZERO_OFFSET, tl.float32)
        v0, v1 = _above_zero(v0, zeros, WIDTH, MATH), _above_zero(v1, zeros, WIDTH, MATH)
        if SCALES == "each":
            scales = tl.load(scale + group_at).to(tl.float32)
            v0, v1 = scaled(v0, scales, MATH), scaled(v1, scales, MATH)
    return v0, v1
