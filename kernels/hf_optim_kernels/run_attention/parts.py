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
def not_before(
    seen, codes, N, token_q, token_k, real_q, real_k, before, after, EARLIER: tl.constexpr, BY_KEY: tl.constexpr
):
    """Return which pairs of ``seen`` none of the first EARLIER rounds has found, by the codes [R, N] of queries and of
    keys. Rows of the tile are queries; BY_KEY: keys.
    """
    for earlier in tl.static_range(EARLIER):
        one = tl.load(codes + earlier * N + token_q, mask=real_q, other=0) + after
        other = tl.load(codes + earlier * N + token_k, mask=real_k, other=0)
        if BY_KEY:  # noqa: SIM108 - one of the two is compiled
            apart = one[None, :] - other[:, None]
        else:
            apart = one[:, None] - other[None, :]
        # Differences below 0 are large without a sign.
        seen = seen & (apart.to(tl.uint32, bitcast=True) > before + after)
    return seen


@triton.jit
def keys_in_run(begin, end, real, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Return how many keys of a run from place ``begin`` to ``end`` a query sees, without its own of UNIT and LAST."""
    count = end - begin + 1
    if UNIT and LAST:
        count -= 1
    return tl.where(real & (end >= begin), count, 0)


@triton.jit
def in_run(place, begin, count):
    """Return whether a place is one of ``count`` from ``begin`` on: without a sign, what is below 0 is large."""
    return (place - begin).to(tl.uint32, bitcast=True) < count.to(tl.uint32, bitcast=True)


@triton.jit
def visible(place_k, begin, count, token_q, token_k, CAUSAL: tl.constexpr, UNIT: tl.constexpr, LAST: tl.constexpr):
    """Return which keys queries see; all arguments broadcast to one tile. A place without a token is -1.

    With UNIT a token does not see itself here: where it sees nothing else, see ``alone``. LAST: its own place is the
    last of its run, and none of the run has a later token.
    """
    seen = in_run(place_k, begin, count)
    if CAUSAL and not LAST:
        seen = seen & (token_k <= token_q)
    if UNIT and not LAST:
        seen = seen & (token_k != token_q)
    return seen
