"""The Triton kernel: a program transforms some blocks of one row in registers, and may quantize the row.

A stage adds and subtracts neighbours, and puts the sums before the differences: the index of a channel is rotated by
one bit. After as many stages as the index has bits, each has been transformed once and the order is the first again.
All stages have the same shapes, so nothing depends on the number of the stage.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..common.numerics import magnitude
from ..w8a8.quantize import encode, token_grid


@triton.jit
def transform(x, BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr):
    """Return ``x`` [BLOCKS, BLOCK] float32, each row times Sylvester's matrix."""
    for _ in tl.static_range(STAGES):
        first, second = tl.split(tl.reshape(x, [BLOCKS, BLOCK // 2, 2]))
        pairs = tl.join(first + second, first - second)
        x = tl.reshape(tl.permute(pairs, (0, 2, 1)), [BLOCKS, BLOCK])
    return x


@triton.jit
def hadamard_kernel(
    x, out, scales, K, x_stride, factor,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr, QUANTIZE: tl.constexpr, EPS: tl.constexpr,
):  # fmt: skip
    """Program (m, p) transforms blocks ``p BLOCKS`` to ``(p + 1) BLOCKS`` of row m; with QUANTIZE it has all of them.

    ``out`` is the row in the dtype of ``x``, or its int8 codes with ``scales`` [rows] float32.
    """
    DTYPE: tl.constexpr = x.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)[:, None]
    column = block * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = column < K
    value = tl.load(x + row * x_stride + column, inside, 0.0).to(tl.float32)
    value = transform(value, BLOCKS, BLOCK, STAGES) * factor
    if QUANTIZE:
        value = value.to(DTYPE).to(tl.float32)
        top = tl.max(tl.max(magnitude(value), 1, keep_dims=True), 0, keep_dims=True)
        zeros = tl.zeros([1, 1], tl.float32)
        scale, zero = token_grid(top, zeros, zeros, DTYPE, EPS, False, False)
        tl.store(out + row * K + column, encode(value, scale, zero, DTYPE, False, False), inside)
        tl.store(scales + row + tl.zeros([1, 1], tl.int32), scale)
    else:
        tl.store(out + row * K + column, value.to(DTYPE), inside)
