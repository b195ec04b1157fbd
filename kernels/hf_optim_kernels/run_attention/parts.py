"""What the kernels share: tokens at places, rows of keys, and which pairs of a tile see each other."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def rows_of(base, token, real, stride, d, D, FULL: tl.constexpr, WIDE: tl.constexpr):
    """Return rows ``token`` of a matrix, zeros where not ``real``; WIDE: in float32. FULL: D is that of the tile."""
    at = base + tl.maximum(token, 0).to(tl.int64)[:, None] * stride + d[None, :]
    kept = real[:, None] & (d < D)[None, :]
    if FULL:
        kept = real[:, None]
    found = tl.load(at, mask=kept, other=0.0)
    if WIDE:
        found = found.to(tl.float32)
    return found


@triton.jit
def through_unit(slope, x, factor):
    """Return the gradient of rows x for that of ``x factor``, which has unit length."""
    wide = x.to(tl.float32)
    along = tl.sum(wide * slope, axis=1) * factor * factor
    return (slope - wide * along[:, None]) * factor[:, None]


@triton.jit
def factors_at(factors, token, real, UNIT: tl.constexpr):
    """Return what scores of keys are multiplied with: with UNIT that of ``factors`` [N], else 1."""
    found = token.to(tl.float32) * 0.0 + 1.0
    if UNIT:
        found = tl.load(factors + token, mask=real, other=0.0)
    return found


@triton.jit
def found_before(
    codes, N, token_q, token_k, real_q, real_k, before, after, EARLIER: tl.constexpr, BY_KEY: tl.constexpr
):
    """Return which pairs one of the first EARLIER rounds has found, by the codes [R, N] of queries and of keys. Rows of
    the tile are queries; BY_KEY: keys.
    """
    found = (token_q[:, None] < -1) & (token_k[None, :] < -1)
    if BY_KEY:
        found = (token_k[:, None] < -1) & (token_q[None, :] < -1)
    for earlier in tl.static_range(EARLIER):
        one = tl.load(codes + earlier * N + token_q, mask=real_q, other=0) + after
        other = tl.load(codes + earlier * N + token_k, mask=real_k, other=0)
        if BY_KEY:  # noqa: SIM108 - one of the two is compiled
            apart = one[None, :] - other[:, None]
        else:
            apart = one[:, None] - other[None, :]
        # Differences below 0 are large without a sign.
        found = found | (apart.to(tl.uint32, bitcast=True) <= before + after)
    return found


@triton.jit
def visible(place_k, low, high, token_q, token_k, CAUSAL: tl.constexpr):
    """Return which keys are in the runs of queries; all arguments broadcast to one tile."""
    seen = (place_k >= low) & (place_k <= high) & (token_k >= 0) & (token_q >= 0)
    if CAUSAL:
        seen = seen & (token_k <= token_q)
    return seen


@triton.jit
def scores_of(s, seen, token_q, token_k, ALONE, UNIT: tl.constexpr):
    """Return scores, -inf where nothing is seen, and with UNIT ``-ALONE`` for a token with itself."""
    if UNIT:
        s = tl.where(token_q == token_k, -ALONE, s)
    return tl.where(seen, s, float("-inf"))
