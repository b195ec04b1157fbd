"""Float32 operations inside Triton kernels."""

from __future__ import annotations

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds a float32 below 2^22 to the nearest even integer
INFINITY_BITS = tl.constexpr(0x7F800000)


@triton.jit
def magnitude(x):
    """Return the bits of ``|x|`` of float32 values as int32: in the order of the values, with Inf and NaN on top."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def divide(x, y):
    """Return ``x / y`` of float32, correctly rounded, with broadcasting."""
    x, y = tl.broadcast(x, y)
    return tl.div_rn(x, y)
