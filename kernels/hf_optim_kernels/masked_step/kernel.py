"""The Triton kernel: a program masks one chunk of one tensor (see ``naive``)."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def zero_kernel(
    addresses, masks, sizes, owners, chunks, KIND: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Zero masked elements of tensor ``owners[p]`` from ``chunks[p] * BLOCK`` on, where p is the program.

    ``addresses``, ``masks`` and ``sizes`` int64 [tensors]: the addresses of tensors (0: skipped) and of their masks
    (one byte per element), and their numbers of elements; ``owners`` and ``chunks`` int32 [programs]. Elements are
    moved as integers of their width (``KIND``); all bits zero is 0 in every floating-point type.
    """
    p = tl.program_id(0)
    owner = tl.load(owners + p)
    at = tl.load(addresses + owner)
    size = tl.load(sizes + owner)
    begin = tl.load(chunks + p).to(tl.int64) * BLOCK
    tensor = at.to(tl.pointer_type(KIND)) + begin
    mask = tl.load(masks + owner).to(tl.pointer_type(tl.int8)) + begin
    if ALIGNED:
        tensor = tl.multiple_of(tensor, 16)
        mask = tl.multiple_of(mask, 16)
    i = tl.arange(0, BLOCK)
    inside = i < tl.where(at == 0, 0, size - begin)
    kept = tl.load(mask + i, inside, 1) != 0
    # Reading and writing all elements is coalesced; storing scattered elements touches as many sectors.
    value = tl.load(tensor + i, inside, 0)
    tl.store(tensor + i, tl.where(kept, value, tl.zeros_like(value)), inside)
