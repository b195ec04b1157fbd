"""Sort the tokens of rows by bucket, in three launches: counts of blocks, their sums, and places.

A token's place is the number of tokens of lower buckets, of those of its own in earlier blocks, and of those before it
in its block: a stable sort whose parts do not depend on the order in which programs run.
"""

from __future__ import annotations

import triton
import triton.language as tl

NOWHERE = tl.constexpr(-(2**30))


@triton.jit
def _bucket_at(buckets, row, n, N, most):
    """Return the buckets of tokens, ``most`` for padding; -1 beyond the row."""
    found = tl.load(buckets + row.to(tl.int64) * N + n, mask=n < N, other=-1).to(tl.int32)
    return tl.minimum(found, most)


@triton.jit
def _before_in_block(buckets, row, block, own, n, N, most, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Return how many tokens of the block ``block`` of a row come before each token n and are in its bucket ``own``.

    Columns of a tile are the tokens n, so that a thread adds up numbers of its own.
    """
    inside = tl.arange(0, STEP)
    count = tl.zeros((SIZE,), tl.int32)
    for start in range(0, SIZE, STEP):
        other = block * SIZE + start + inside
        bucket = _bucket_at(buckets, row, other, N, most)
        same = (own[None, :] == bucket[:, None]) & (other[:, None] < n[None, :])
        count += tl.sum(same.to(tl.int32), axis=0)
    return count


@triton.jit
def _count_kernel(buckets, counts, N, most, blocks, SIZE: tl.constexpr):
    """Add up how many tokens of each bucket a block of SIZE tokens has: ``counts`` int32 [rows, blocks, most + 1],
    zeros before. Programs are (block, row).
    """
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = block * SIZE + tl.arange(0, SIZE)
    own = _bucket_at(buckets, row, n, N, most)
    at = counts + (row * blocks + block).to(tl.int64) * (most + 1) + tl.maximum(own, 0)
    tl.atomic_add(at, 1, mask=n < N, sem="relaxed")


@triton.jit
def _sum_kernel(counts, begins, most, blocks, tiles, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Replace counts by those of the blocks before, and write the tokens of each bucket: ``begins`` int32
    [rows, most + 2], from its second entry on. Programs are (tile of SIZE buckets, row).
    """
    tile, row = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    bucket, inside = tile * SIZE + tl.arange(0, SIZE), tl.arange(0, STEP)
    total = tl.zeros((SIZE,), tl.int32)
    for start in range(0, blocks, STEP):
        block = start + inside
        real = (block < blocks)[:, None] & (bucket <= most)[None, :]
        at = counts + (row * blocks + block).to(tl.int64)[:, None] * (most + 1) + bucket[None, :]
        own = tl.load(at, mask=real, other=0)
        until = tl.cumsum(own, axis=0)
        tl.store(at, until - own + total[None, :], mask=real)
        total += tl.sum(own, axis=0)
    tl.store(begins + row * (most + 2) + 1 + bucket, total, mask=bucket <= most)


@triton.jit
def _begin_kernel(begins, most, SIZE: tl.constexpr):
    """Turn the tokens of each bucket into those of lower buckets, ``begins`` [rows, most + 2]. Programs are rows."""
    row, inside = tl.program_id(0), tl.arange(0, SIZE)
    total = tl.sum(tl.zeros((SIZE,), tl.int32), axis=0)
    tl.store(begins + row * (most + 2), total)
    for start in range(0, most + 1, SIZE):
        bucket = start + inside
        at = begins + row * (most + 2) + 1 + bucket
        own = tl.load(at, mask=bucket <= most, other=0)
        tl.store(at, tl.cumsum(own, axis=0) + total, mask=bucket <= most)
        total += tl.sum(own, axis=0)


@triton.jit
def _ranks(buckets, counts, begins, row, block, own, n, N, most, blocks, SIZE: tl.constexpr, STEP: tl.constexpr):
    """Return where the bucket ``own`` of each token begins among the places of a row, and how many of its tokens come
    before n.
    """
    before = tl.load(counts + (row * blocks + block).to(tl.int64) * (most + 1) + own, mask=n < N, other=0)
    begin = tl.load(begins + row * (most + 2) + own, mask=n < N, other=0)
    return begin, before + _before_in_block(buckets, row, block, own, n, N, most, SIZE, STEP)


@triton.jit
def _run_kernel(
    buckets, counts, begins, order, low, high, first, last, codes, N, most, blocks, chunk, before, after, step, lonely,
    WHOLE: tl.constexpr, CAUSAL: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write ``naive.Runs`` of the tokens of a block. Programs are (block, row)."""
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = block * SIZE + tl.arange(0, SIZE)
    own = _bucket_at(buckets, row, n, N, most)
    begin, rank = _ranks(buckets, counts, begins, row, block, own, n, N, most, blocks, SIZE, STEP)
    real, inside = own < most, n < N
    place = begin + rank
    if WHOLE:
        padding = tl.load(begins + row * (most + 2) + most)  # where padding begins
        rank = place
        # Padding counts its places behind all tokens, where nothing is seen.
        total = tl.where(real, padding, 0)
        begin = begin * 0
    else:
        total = tl.load(begins + row * (most + 2) + own + 1, mask=inside, other=0) - begin
    chunks = rank // chunk
    a = begin + tl.maximum(chunks - before, 0) * chunk
    z = begin + tl.minimum((chunks + after + 1) * chunk, total) - 1
    one = begin + tl.maximum(chunks - after, 0) * chunk
    end = begin + tl.minimum((chunks + before + 1) * chunk, total) - 1
    code = chunks
    if not WHOLE:
        code += own * step
    if CAUSAL:
        z = place
        one = place
    alone = n < lonely
    base = row.to(tl.int64) * N
    at = base + place
    tl.store(order + at, tl.where(real, n, -1), mask=inside)
    tl.store(low + at, tl.where(alone, place, a), mask=inside)
    tl.store(high + at, tl.where(alone, place - 1, z), mask=inside)
    tl.store(first + at, one, mask=inside)
    tl.store(last + at, end, mask=inside)
    tl.store(codes + base + n, tl.where(real, code, NOWHERE), mask=inside)


@triton.jit
def _last_kernel(
    buckets, counts, begins, of_keys, key_counts, key_begins, order, low, high, H, G, N, most, blocks, width,
    KEYS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Write the places of the tokens of a block and, unless KEYS, the run of keys that each sees: ``runs_of_last``.
    Programs are (block, row); a row of queries reads the keys of its group.
    """
    block, row = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    n = block * SIZE + tl.arange(0, SIZE)
    inside = n < N
    own = _bucket_at(buckets, row, n, N, most)
    begin, rank = _ranks(buckets, counts, begins, row, block, own, n, N, most, blocks, SIZE, STEP)
    at = row.to(tl.int64) * N + begin + rank
    tl.store(order + at, tl.where(own < most, n, -1), mask=inside)
    if not KEYS:
        key_row = row // H * G + row % H // (H // G)
        begin, rank = _ranks(of_keys, key_counts, key_begins, key_row, block, own, n, N, most, blocks, SIZE, STEP)
        tl.store(low + at, begin + tl.maximum(rank - width, 0), mask=inside)
        tl.store(high + at, begin + rank - 1, mask=inside)
