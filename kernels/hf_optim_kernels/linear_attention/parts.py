"""What the kernels share: rows of matrices, their features, gates, and the operands of products.

Exponents are to base 2: ``root`` and ``half`` of a launch include log2(e) for positive features.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_at(base, n, real, stride, d, D, HALF: tl.constexpr):
    """Return rows ``n`` of a matrix [rows, D], zeros where not ``real``; in float32 unless HALF (bfloat16)."""
    at = base + n.to(tl.int64)[:, None] * stride + d[None, :]
    found = tl.load(at, mask=real[:, None] & (d < D)[None, :], other=0.0)
    return operand(found, HALF)


@triton.jit
def operand(x, HALF: tl.constexpr):
    """Return a tile in the type of products: bfloat16, or float32."""
    if HALF:  # noqa: SIM108 - one of the two is compiled
        found = x.to(tl.bfloat16)
    else:
        found = x.to(tl.float32)
    return found


@triton.jit
def length_of(x):
    """Return the norm of each row, float32."""
    wide = x.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, axis=1))


@triton.jit
def factors_of(length, root, half, eps, NORMED: tl.constexpr):
    """Return what the products of each row with W are multiplied with, and what is subtracted for its norm."""
    by = length * 0.0 + 1.0
    if NORMED:
        by = 1.0 / (length + eps)
    size = length * by
    return root * by, half * size * size


@triton.jit
def weight_rows(weight, f, d, m, D):
    """Return rows ``f`` of W [BLOCK_F, BLOCK_D], zeros beyond m."""
    return tl.load(weight + f[:, None] * D + d[None, :], mask=(f < m)[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def exponents(x, factor, norm, w, f, m, TRIG: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
              EXACT: tl.constexpr):  # fmt: skip
    """Return the exponents of features ``f`` of rows x (to base 2; -inf beyond m), or the angles of TRIG, in turns.

    An error of an exponent is a relative one of its feature, so that W is not rounded: with SPLIT it is the sum of two
    numbers of 16 bits.
    """
    rows = operand(w, HALF)
    found = tl.dot(x, tl.trans(rows), input_precision=EXACT)
    if SPLIT:
        rest = operand(w.to(tl.float32) - rows.to(tl.float32), HALF)
        found += tl.dot(x, tl.trans(rest), input_precision=EXACT)
    found = found * factor[:, None]
    if not TRIG:
        found = tl.where((f < m)[None, :], found - norm[:, None], float("-inf"))
    return found


@triton.jit
def features(found, top, f, m, share, TRIG: tl.constexpr):
    """Return the features of ``exponents``, relative to ``top``: of TRIG sines and cosines, else twice the same."""
    if TRIG:
        first = tl.where((f < m)[None, :], sine(found) * share, 0.0)
        second = tl.where((f < m)[None, :], cosine(found) * share, 0.0)
    else:
        first = tl.exp2(found - top[:, None])
        second = first
    return first, second


@triton.jit
def features_of(x, factor, norm, top, w, f, m, share, TRIG: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
                EXACT: tl.constexpr):  # fmt: skip
    """Return the features ``f`` of rows x, relative to ``top``, as ``features`` does."""
    found = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
    first, second = features(found, top, f, m, share, TRIG)
    return first, second


@triton.jit
def sine(turns):
    """Return the sine of angles in turns, to 2e-7.

    That of the library has a branch for large angles, which is a thousand instructions in each of its places.
    """
    near = turns - tl.floor(turns + 0.5)
    return _series(tl.where(tl.abs(near) > 0.25, tl.where(near > 0.0, 0.5, -0.5) - near, near))


@triton.jit
def cosine(turns):
    """Return the cosine of angles in turns, to 2e-7."""
    return _series(0.25 - tl.abs(turns - tl.floor(turns + 0.5)))


@triton.jit
def _series(turns):
    """Return the sine of at most a quarter of a turn."""
    x = turns * 6.283185307179586
    y = -x * x
    rest = 1.0 + y * (1 / 72) * (1.0 + y * (1 / 110) * (1.0 + y * (1 / 156)))
    return x * (1.0 + y * (1 / 6) * (1.0 + y * (1 / 20) * (1.0 + y * (1 / 42) * rest)))


@triton.jit
def rest_of(gate):
    """Return 1 - g for the natural logarithm of g, without cancellation where g is close to 1."""
    x = -gate
    series = x * (1.0 - x * (1 / 2) * (1.0 - x * (1 / 3) * (1.0 - x * (1 / 4) * (1.0 - x * (1 / 5) * (1.0 - x / 6)))))
    return tl.where(x < 0.25, series, 1.0 - tl.exp(gate))


@triton.jit
def keys_of(tops, gates, mask, pair, b, n, M, TRIG: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr):
    """Return of each key: its logarithm ``log2`` of what it counts, 0 for features without one; the top of its
    features; the decay up to it in its chunk; and of the chunk the decay in whole. Keys that are not seen count -inf.
    """
    seen = n < M
    if HAS_MASK:
        seen = tl.load(mask + b.to(tl.int64) * M + n, mask=seen, other=0) != 0
    own = pair.to(tl.int64) * M + n
    top = n * 0.0
    if not TRIG:
        top = tl.load(tops + own, mask=n < M, other=0.0)
    log, decay = top, n * 0.0
    if HAS_GATE:
        gate = tl.load(gates + own, mask=seen, other=0.0).to(tl.float32)
        log = log + tl.log2(rest_of(tl.where(seen, gate, -1.0)))
        decay = tl.cumsum(gate * LOG2E, axis=0)
        whole = tl.sum(gate * LOG2E, axis=0)
    else:
        whole = 0.0
    return tl.where(seen, log, float("-inf")), top, decay, whole


@triton.jit
def finite(x):
    """Return numbers with 0 in place of -inf, of which a difference would be NaN."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def through(slope, total, x, length, root, half, eps, NORMED: tl.constexpr, TRIG: tl.constexpr):
    """Return the gradient of rows x [C, D] for that of their products with W, ``slope`` = da W, and ``total`` = sum da.

    ``root`` and ``half`` are sqrt(scale) and scale, to base e.
    """
    wide = x.to(tl.float32)
    by = length * 0.0 + 1.0
    if NORMED:
        by = 1.0 / (length + eps)
    found = slope * root
    if not TRIG:
        found -= wide * (half * by * total)[:, None]
    if NORMED:
        along = tl.sum(wide * found, axis=1) / tl.where(length > 0.0, length, 1.0) * by
        found = (found - wide * along[:, None]) * by[:, None]
    return found
