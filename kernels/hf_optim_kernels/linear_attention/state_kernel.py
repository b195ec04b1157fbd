"""States: the sums over each chunk of keys (or, backward, of queries), and what precedes each chunk."""

from __future__ import annotations

import triton
import triton.language as tl

from .parts import (
    LN2,
    LOG2E,
    exponents,
    factors_of,
    features,
    finite,
    keys_of,
    length_of,
    operand,
    rows_at,
    weight_rows,
)


@triton.jit
def _keys_kernel(
    key, value, weight, mask, gates, tops, parts, sums, references, decays, root, half, eps, share, T, H, P, G, M, D,
    DV, m, w_h, k_b, k_h, k_n, v_b, v_h, v_n,
    C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sum ``phi(k) v^T`` and ``phi(k)`` over a chunk, decayed to its end, relative to the largest weight of a key.

    Programs are (chunk, batch row and state head). ``tops`` [B P, M] gets the largest exponent of each key; ``parts``
    [B P, T, F, DV], ``sums`` [B P, T, F], ``references`` and ``decays`` [B P, T] the results.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, p = pair // P, pair % P
    g = p // (P // G)
    n, d, dv = t * C + tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    x = rows_at(key + b.to(tl.int64) * k_b + g.to(tl.int64) * k_h, n, n < M, k_n, d, D, HALF)
    v = rows_at(value + b.to(tl.int64) * v_b + g.to(tl.int64) * v_h, n, n < M, v_n, dv, DV, HALF)
    weights = weight + p * w_h
    factor, norm = factors_of(length_of(x), root, half, eps, NORMED)
    if not TRIG:
        largest = tl.full((C,), float("-inf"), tl.float32)
        for start in range(0, m, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            w = weight_rows(weights, f, d, m, D)
            a = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
            largest = tl.maximum(largest, tl.max(a, axis=1))
        tl.store(tops + pair.to(tl.int64) * M + n, largest, mask=n < M)
    log, _none, decay, whole = keys_of(tops, gates, mask, pair, b, n, M, True, HAS_GATE, HAS_MASK)
    top = n * 0.0
    if not TRIG:
        top = largest
        log += top
    log += whole - decay
    reference = 0.0
    if not TRIG:
        reference = tl.max(log)
    counts = tl.exp2(log - finite(reference))
    at = pair.to(tl.int64) * T + t
    F = m
    if TRIG:
        F = 2 * m
    for start in range(0, m, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        w = weight_rows(weights, f, d, m, D)
        a = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
        first, second = features(a, top, f, m, share, TRIG)
        _put(first * counts[:, None], v, parts, sums, at * F + f, f < m, dv, DV, HALF, PRECISION)
        if TRIG:
            _put(second * counts[:, None], v, parts, sums, at * F + m + f, f < m, dv, DV, HALF, PRECISION)
    tl.store(references + at, reference)
    tl.store(decays + at, whole)


@triton.jit
def _put(weighted, v, parts, sums, row, real, dv, DV, HALF: tl.constexpr, PRECISION: tl.constexpr):
    """Store the sums over a chunk of weighted features [C, BLOCK_F] times values, and alone, at rows of F."""
    held = tl.dot(tl.trans(operand(weighted, HALF)), v, input_precision=PRECISION)
    tl.store(
        parts + row[:, None] * DV + dv[None, :],
        held.to(parts.dtype.element_ty),
        mask=real[:, None] & (dv < DV)[None, :],
    )
    tl.store(sums + row, tl.sum(weighted, axis=0), mask=real)


@triton.jit
def _queries_kernel(
    query, grad_out, out, weight, gates, mask, tops, logs, delta, parts, sums, references, decays, root, half, eps,
    share, T, H, P, G, N, D, DV, m, w_h, q_b, q_h, q_n, g_b, g_h, g_n, o_b, o_h, o_n,
    C: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TRIG: tl.constexpr,
    NORMED: tl.constexpr, HAS_GATE: tl.constexpr, HAS_MASK: tl.constexpr, SPLIT: tl.constexpr, HALF: tl.constexpr,
    PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Sum ``phi(q) dO^T`` and ``-phi(q) rowsum(dO O)`` over a chunk and the heads of a group, over the denominators.

    Programs are (chunk, batch row and state head); the sums are decayed to the beginning of the chunk. ``delta`` [B H,
    N] gets the row sums, with the sign and 0 for denominators that were replaced. ``logs`` has log2 of denominators,
    +inf where replaced; TRIG: those of what was divided by, and ``tops`` is 1 where replaced.
    """
    t, pair = tl.program_id(0) % T, tl.program_id(0) // T
    b, p = pair // P, pair % P
    group = H // P
    n, d, dv = t * C + tl.arange(0, C), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    real = n < N
    _log, _none, decay, whole = keys_of(tops, gates, mask, pair, b, n, N, True, HAS_GATE, HAS_MASK)
    weights = weight + p * w_h
    largest = tl.full((C,), float("-inf"), tl.float32)
    for each in range(0, group):
        h = p * group + each
        own = (b * H + h).to(tl.int64) * N + n
        log = tl.load(logs + own, mask=real, other=0.0)
        replaced = log == float("inf")
        if TRIG:
            replaced = tl.load(tops + own, mask=real, other=0.0) > 0.0
        largest = tl.maximum(largest, tl.where(real, decay - log, float("-inf")))
        at = grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h
        slope = rows_at(at, n, real, g_n, dv, DV, False)
        result = rows_at(out + b.to(tl.int64) * o_b + h.to(tl.int64) * o_h, n, real, o_n, dv, DV, False)
        tl.store(delta + own, tl.where(replaced, 0.0, -tl.sum(slope * result, axis=1)), mask=real)
    tl.debug_barrier()  # delta is read by other threads
    reference = tl.max(largest)
    base = finite(reference)
    at = pair.to(tl.int64) * T + t
    F = m
    if TRIG:
        F = 2 * m
    for start in range(0, m, BLOCK_F):
        f = start + tl.arange(0, BLOCK_F)
        w = weight_rows(weights, f, d, m, D)
        held = tl.zeros((BLOCK_F, BLOCK_DV), tl.float32)
        total = tl.zeros((BLOCK_F,), tl.float32)
        if TRIG:
            held_2 = tl.zeros((BLOCK_F, BLOCK_DV), tl.float32)
            total_2 = tl.zeros((BLOCK_F,), tl.float32)
        for each in range(0, group):
            h = p * group + each
            own = (b * H + h).to(tl.int64) * N + n
            log = tl.load(logs + own, mask=real, other=float("inf"))
            counts = tl.exp2(decay - log - base)
            x = rows_at(query + b.to(tl.int64) * q_b + h.to(tl.int64) * q_h, n, real, q_n, d, D, HALF)
            slope = rows_at(grad_out + b.to(tl.int64) * g_b + h.to(tl.int64) * g_h, n, real, g_n, dv, DV, HALF)
            factor, norm = factors_of(length_of(x), root, half, eps, NORMED)
            a = exponents(x, factor, norm, w, f, m, TRIG, SPLIT, HALF, EXACT)
            top = n * 0.0
            if not TRIG:
                top = tl.load(tops + own, mask=real, other=0.0)
            first, second = features(a, top, f, m, share, TRIG)
            less = tl.load(delta + own, mask=real, other=0.0)
            first = first * counts[:, None]
            held += tl.dot(tl.trans(operand(first, HALF)), slope, input_precision=PRECISION)
            total += tl.sum(first * less[:, None], axis=0)
            if TRIG:
                second = second * counts[:, None]
                held_2 += tl.dot(tl.trans(operand(second, HALF)), slope, input_precision=PRECISION)
                total_2 += tl.sum(second * less[:, None], axis=0)
        row, kept = at * F + f, (f < m)[:, None] & (dv < DV)[None, :]
        tl.store(parts + row[:, None] * DV + dv[None, :], held.to(parts.dtype.element_ty), mask=kept)
        tl.store(sums + row, total, mask=f < m)
        if TRIG:
            row += m
            tl.store(parts + row[:, None] * DV + dv[None, :], held_2.to(parts.dtype.element_ty), mask=kept)
            tl.store(sums + row, total_2, mask=f < m)
    tl.store(references + at, reference)
    tl.store(decays + at, whole)


@triton.jit
def _scan_kernel(
    parts, sums, references, decays, given, given_sums, given_references, starts, last, last_sums, last_references, T,
    FD, F, BLOCKS,
    STEP: tl.constexpr, BLOCK: tl.constexpr, FREE: tl.constexpr, HAS_GIVEN: tl.constexpr, KEEP: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Replace the sums of each chunk by those of what precedes it (REVERSE: follows it), and write those of all.

    Programs are (block of a state, batch row and state head), the first BLOCKS of the products and the others of the
    sums. ``starts`` [B P, T] gets the references of the results; without KEEP only ``last`` is written. FREE: states
    have references, else these are 0. Given and last references are natural logarithms, others to base 2.
    """
    block, pair = tl.program_id(0), tl.program_id(1)
    if block < BLOCKS:
        _scan(
            parts, references, decays, given, given_references, starts, last, last_references, T, FD, pair, block,
            STEP, BLOCK, FREE, HAS_GIVEN, KEEP, REVERSE, PRECISION, True,
        )  # fmt: skip
    else:
        _scan(
            sums, references, decays, given_sums, given_references, starts, last_sums, last_references, T, F, pair,
            block - BLOCKS, STEP, BLOCK, FREE, HAS_GIVEN, KEEP, REVERSE, PRECISION, False,
        )  # fmt: skip


@triton.jit
def _tile(parts, at, chunk, T, SIZE, e, real, REVERSE: tl.constexpr):
    """Return the sums of chunks, zeros beyond the last: read before the tile in front of it is used."""
    inside = chunk < T
    if REVERSE:
        chunk = T - 1 - chunk
    where = parts + ((at * T + chunk) * SIZE)[:, None] + e[None, :]
    return tl.load(where, mask=inside[:, None] & real[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scan(
    parts, references, decays, given, given_references, starts, last, last_references, T, SIZE, pair, block,
    STEP: tl.constexpr, BLOCK: tl.constexpr, FREE: tl.constexpr, HAS_GIVEN: tl.constexpr, KEEP: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    e, x = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, STEP)
    real = e < SIZE
    at = pair.to(tl.int64)
    state = tl.zeros((BLOCK,), tl.float32)
    reference = 0.0
    if FREE:
        reference = -float("inf")
    if HAS_GIVEN:
        state = tl.load(given + at * SIZE + e, mask=real, other=0.0).to(tl.float32)
        if FREE:
            reference = tl.load(given_references + at) * LOG2E
    earlier = x[None, :] < x[:, None]
    tile = _tile(parts, at, x, T, SIZE, e, real, REVERSE)
    for start in range(0, T, STEP):
        chunk = start + x
        inside = chunk < T
        if REVERSE:
            chunk = T - 1 - chunk
        coming = _tile(parts, at, start + STEP + x, T, SIZE, e, real, REVERSE)
        own = tl.load(references + at * T + chunk, mask=inside, other=float("-inf"))
        decay = tl.load(decays + at * T + chunk, mask=inside, other=0.0)
        until = tl.cumsum(decay, axis=0)
        whole = tl.sum(decay, axis=0)
        # Logarithms of what each chunk counts before another, and what the state counts that came with the first.
        logs = tl.where(earlier, (until - decay)[:, None] + (own - until)[None, :], float("-inf"))
        past = reference + until - decay
        ends = own - until + whole
        before, after = tl.zeros((STEP,), tl.float32), 0.0
        if FREE:
            before = tl.maximum(past, tl.max(logs, axis=1))
            after = tl.maximum(reference + whole, tl.max(ends, axis=0))
        base, end = finite(before), finite(after)
        where = parts + ((at * T + chunk) * SIZE)[:, None] + e[None, :]
        kept = inside[:, None] & real[None, :]
        if KEEP:
            found = tl.dot(tl.exp2(logs - base[:, None]), tile, input_precision=PRECISION)
            found += tl.exp2(past - base)[:, None] * state[None, :]
            tl.store(where, found.to(parts.dtype.element_ty), mask=kept)
            if WRITE and block == 0:
                tl.store(starts + at * T + chunk, before, mask=inside)
        state = state * tl.exp2(reference + whole - end) + tl.sum(tile * tl.exp2(ends - end)[:, None], axis=0)
        reference = after
        tile = coming
    tl.store(last + at * SIZE + e, state, mask=real)
    if WRITE and block == 0:
        tl.store(last_references + at, reference * LN2)
