"""Split-k: several programs share the columns of a tile, and the last of them to arrive adds up their sums.

Every program counts itself in the tile's semaphore, which is zero again after the launch. The parts are added in the
order of the programs, so that the sum does not depend on which was last: the same input gives the same bits, in one
launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch


def launch_split(
    kernel: Any,
    grid: tuple[int, int, int],
    before: tuple,
    after: tuple,
    shape: tuple[int, int],
    dtype: torch.dtype,
    **options: Any,
) -> Tensor:
    """Launch a kernel whose programs along the third dimension of ``grid`` share a tile; return its output.

    Args:
        before: the kernel's arguments before the output and the partial sums; the first is a tensor.
        after: those behind them, the semaphores first.
        shape, dtype: of the output. Partial sums are float32 [split, *shape].
        options: as of ``launch``.
    """
    device = before[0].device
    out = torch.empty(shape, dtype=dtype, device=device)
    partial = out if grid[2] == 1 else torch.empty((grid[2], *shape), dtype=torch.float32, device=device)
    launch(kernel, grid, (*before, out, partial, *after), **options)
    return out


def new_semaphores(count: int, device: torch.device) -> Tensor:
    """Return zeros for ``count`` tiles, at least one. Launches that share them must not overlap."""
    return torch.zeros(max(1, count), dtype=torch.int32, device=device)


def parts_memory(y: Tensor, tiles: int, split: int, size: int, dtype: torch.dtype) -> Tensor:
    """Return memory for ``split`` parts of ``size`` numbers per tile; without a split, ``y``, which is not used."""
    return y if split == 1 else torch.empty(tiles * split * size, dtype=dtype, device=y.device)


@triton.jit
def output_tile(pid_m, pid_n, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return rows and columns of a tile of the output, and its columns within N."""
    rows = pid_m * BLOCK_M + tl.arange(0, BLOCK_M)
    wanted = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end repeat the last one and are not stored: loads of the weight then need no mask.
    return rows, wanted, tl.minimum(wanted, N - 1)


@triton.jit
def store_split(
    acc, partial, semaphores, bias, out, rows, wanted, cols, M, N, HAS_BIAS: tl.constexpr, SPLIT: tl.constexpr
):  # fmt: skip
    """Store a tile ``acc`` [BLOCK_N, BLOCK_M] of out [M, N] in float32, or with ``SPLIT`` the sum over programs.

    ``wanted`` are its columns, ``cols`` the same within N; partial [SPLIT, M, N]. The last program to arrive stores.
    Programs are (columns, rows, split).
    """
    pid_n, pid_m, pid_s = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    at = rows.to(tl.int64)[None, :] * N + wanted[:, None]
    mask = (rows < M)[None, :] & (wanted < N)[:, None]
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        tl.store(partial + pid_s * size + at, acc, mask=mask)
        tl.debug_barrier()  # every thread has stored its part before one of them counts
        semaphore = semaphores + pid_m * tl.num_programs(0) + pid_n
        last = tl.atomic_add(semaphore, 1, sem="acq_rel") == SPLIT - 1
        if last:
            acc = tl.zeros_like(acc)
            for part in tl.static_range(SPLIT):
                acc += tl.load(partial + part * size + at, mask=mask, other=0.0)
            if HAS_BIAS:
                acc += tl.load(bias + cols).to(tl.float32)[:, None]
            tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)
            tl.store(semaphore, 0)
    else:
        if HAS_BIAS:
            acc += tl.load(bias + cols).to(tl.float32)[:, None]
        tl.store(out + at, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def is_last(semaphores, tile, SPLIT: tl.constexpr):
    """Return True if this program is the last of ``SPLIT`` to arrive at a tile, whose semaphore is then zero again."""
    # All threads have stored before one of them counts, which publishes the stores.
    tl.debug_barrier()
    last = tl.atomic_add(semaphores + tile, 1, sem="acq_rel") == SPLIT - 1
    if last:
        tl.store(semaphores + tile, 0)
    return last


@triton.jit
def tile_parts(partial, tile, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SPLIT: tl.constexpr):
    """Return addresses [BLOCK_N, BLOCK_M] of the first part of a tile; the parts of a tile follow each other."""
    own = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return partial + tile.to(tl.int64) * (SPLIT * BLOCK_N * BLOCK_M) + own


@triton.jit
def store_part(acc, parts, part, semaphores, tile, SPLIT: tl.constexpr):
    """Store ``acc`` as one of the ``parts`` (see ``tile_parts``); True for the last program to arrive."""
    tl.store(parts + part * (acc.shape[0] * acc.shape[1]), acc)
    tl.debug_barrier()
    return tl.atomic_add(semaphores + tile, 1, sem="acq_rel") == SPLIT - 1


@triton.jit
def sum_parts(acc, parts, semaphores, tile, SPLIT: tl.constexpr):
    """Return the sum of all ``parts``, of the shape and type of ``acc``; the semaphore is zero afterwards."""
    total = tl.zeros_like(acc)
    for part in range(SPLIT):
        total += tl.load(parts + part * (acc.shape[0] * acc.shape[1]), cache_modifier=".cg")
    tl.store(semaphores + tile, 0)
    return total
