"""The activation between the two products of an expert, inside of a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

SILU, GELU, GELU_TANH, RELU = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
UNGATED, CONCATENATED, INTERLEAVED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
# Columns of the gate that stand next to their columns of up in a tile. Threads hold columns of the tensor cores'
# result in such groups, so that the two meet in one thread.
CHUNK = tl.constexpr(8)


@triton.jit
def tile_rows(wanted, N, LAYOUT: tl.constexpr, ACTIVATE: tl.constexpr, CHUNK: tl.constexpr):
    """Return rows of the first matrix for columns of a tile of products, and which of its N output columns they are.

    Of ``wanted`` (2 N columns with a gate), ``CHUNK`` rows of the gate and as many of up follow each other, or single
    rows if they do so in the matrix. Without ACTIVATE a tile has the rows of the matrix.
    """
    rows, columns = wanted, wanted
    if ACTIVATE:
        if LAYOUT == CONCATENATED:
            columns = wanted // (2 * CHUNK) * CHUNK + wanted % CHUNK
            rows = wanted // CHUNK % 2 * N + columns
        elif LAYOUT == INTERLEAVED:
            columns = wanted // 2
    return rows, columns


@triton.jit
def activate(x, alpha, ACT: tl.constexpr):
    """Return an activation of ``x``, float32."""
    if ACT == SILU:
        y = x / (1.0 + tl.exp(-alpha * x))
    elif ACT == GELU:
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == GELU_TANH:
        # tanh(z) = 1 - 2 / (exp(2 z) + 1)
        z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        y = x * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))
    else:
        y = tl.where(x < 0.0, 0.0, x)
        if ACT != RELU:
            y = y * y
    return y


@triton.jit
def gated(first, up, alpha, offset, limit, ACT: tl.constexpr, CLAMP: tl.constexpr):
    """Return ``act(min(first, limit)) * (clamp(up, -limit, limit) + offset)``; the bounds only with CLAMP."""
    if CLAMP:
        # NaN stays NaN.
        first = tl.where(first > limit, limit, first)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    return activate(first, alpha, ACT) * (up + offset)


@triton.jit
def activate_tile(
    acc, alpha, offset, limit, LAYOUT: tl.constexpr, ACT: tl.constexpr, CLAMP: tl.constexpr, CHUNK: tl.constexpr,
    M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Return the activation [M, N] of a tile of products with the columns of ``tile_rows``."""
    if LAYOUT == UNGATED:
        y = activate(acc, alpha, ACT)
    else:
        if LAYOUT == CONCATENATED:
            first, up = tl.split(tl.permute(tl.reshape(acc, (M, N // CHUNK, 2, CHUNK)), (0, 1, 3, 2)))
            first, up = tl.reshape(first, (M, N)), tl.reshape(up, (M, N))
        else:
            first, up = tl.split(tl.reshape(acc, (M, N, 2)))
        y = gated(first, up, alpha, offset, limit, ACT, CLAMP)
    return y
