"""Which kernel runs for a number of rows, and its tiles."""

from __future__ import annotations

from typing import Any

import torch

from ..common import tuning
from .naive import HALF, stored_groups24

Config = dict[str, Any]
# With more rows, products are bound by arithmetic, not by bandwidth.
FEW_ROWS = 64
SEMAPHORES = 1 << 14
# With more, a weight in the order of sparse tensor cores is decompressed: faster on five shapes at 256 rows (H200).
MOST_TILED_ROWS = 128


def config(
    path: str, block_m: int, block_n: int, groups24: int, split: int, warps: int, stages: int, algorithm: int = 0
) -> Config:
    """Return a configuration.

    ``path`` is "row", "dot", "tiles" (see ``tiles``), "library" (cuSPARSELt, with the number of its ``algorithm``) or
    "dense" (decompress, then the dense product). Tuned tables name the 2:4 groups of a step ``FOURS``.
    """
    names = ("path", "BLOCK_M", "BLOCK_N", "FOURS", "SPLIT", "num_warps", "num_stages", "algorithm")
    return dict(zip(names, (path, block_m, block_n, groups24, split, warps, stages, algorithm), strict=True))


DENSE = config("dense", 0, 0, 0, 1, 0, 0)
LIBRARY = config("library", 0, 0, 0, 1, 0, 0)
# Those that were the fastest for any shape (cuSPARSELt 0.8, H200).
LIBRARY_ALGORITHMS = (0, 10, 12, 13, 15, 17, 20)


def tiles(rows: int, outputs: int, ahead: int, split: int, warps: int, inputs: int = 0) -> Config:
    """Return a configuration of the kernel for sparse tensor cores.

    Args:
        rows, outputs: rows of inputs (8, 16, 32, 64) and outputs (16, 32, 64) of a warp.
        ahead: tiles of 128 columns that its registers hold.
        inputs: how it reads inputs: in words (0), in pieces of 16 bytes (1), or in the order of its lanes, after a
            launch that orders them (2), which pays where many rows are read often.
    """
    return config("tiles", rows, outputs, 32 * ahead, split, warps, 1, inputs)


def default_tiles(N: int, K: int, M: int) -> Config:
    """Return a good guess for codes in the order of sparse tensor cores."""
    units = K // 128
    ahead = min(2 if units <= 48 else 4, units)
    # Tiles with few outputs fill the GPU; tiles with many reuse their inputs more often.
    narrow = N <= 8192
    if M > MOST_TILED_ROWS:
        return DENSE
    if M == 1:
        return tiles(8, 16, ahead, 1, 4)
    if M <= 8:
        return tiles(8, 32, 2, 2, 4, 1) if N * K > 1 << 25 else tiles(8, 16, 2, 1, 8, 1)
    if M <= 16:
        return tiles(16, 32, ahead, 1, 4, 2) if narrow and units <= 48 else tiles(16, 16, min(4, units), 1, 4, 2)
    if M <= 32:
        return tiles(32, 16, ahead, 1, 4, 2) if narrow else tiles(32, 32, 1, 2, 2, 2)
    return tiles(32, 32, 1, 1, 4, 2) if narrow and M <= 64 else tiles(64, 32, 1, 2, 2, 2)


def tiled_candidates(N: int, K: int, M: int) -> list[Config]:
    """Return configurations worth timing for codes in the order of sparse tensor cores, the likeliest first."""
    if M <= 1:
        shapes = [(16, 2, 1, 4, 0), (16, 4, 1, 4, 0), (16, 2, 1, 8, 0), (16, 3, 1, 4, 0), (32, 2, 2, 4, 0)]
    elif M <= 8:
        shapes = [(16, 2, 1, 4, 1), (32, 2, 2, 4, 1), (16, 2, 1, 8, 1), (16, 2, 1, 4, 2), (32, 2, 2, 4, 2)]
        shapes += [(16, 2, 1, 4, 0), (16, 4, 1, 4, 1), (32, 2, 1, 4, 2)]
    else:
        shapes = [(32, 1, 2, 4, 2), (32, 2, 2, 4, 2), (16, 2, 1, 4, 2), (32, 1, 1, 4, 2), (16, 1, 1, 8, 2)]
        shapes += [(64, 1, 4, 4, 2), (64, 1, 2, 4, 2), (32, 1, 4, 4, 2), (16, 4, 1, 4, 2), (32, 1, 2, 2, 2)]
        shapes += [(64, 1, 1, 4, 2)]
    blocks = [max(8, min(tuning.bucket(M), 64))] + ([32] if M >= 64 else [])
    found = [tiles(rows, *shape) for shape in shapes for rows in blocks if rows * shape[0] <= 2048]
    guess = default_tiles(N, K, M)
    return [guess, *(each for each in found if each != guess), *([DENSE] if M >= 64 and guess != DENSE else [])]


def split_of(N: int, K: int, block_n: int, tiles: int = 512) -> int:
    """Return the split for about ``tiles`` programs, each with at least two k-tiles."""
    k_tiles = stored_groups24(K) // (2 * HALF)
    wanted = max(1, round(tiles / -(-N // block_n)))
    return max(1, min(wanted, k_tiles // 2, 16))


def wide_candidates(N: int, K: int, M: int) -> list[Config]:
    """Return tiles of ``wide_kernel`` worth timing."""
    kinds = ((32, 128, 4, 3), (64, 128, 8, 3), (64, 128, 4, 3), (128, 128, 8, 2), (256, 128, 8, 2), (128, 256, 8, 2))
    return [
        config("wide", m, n, 0, split, warps, ring) for m, n, warps, ring in kinds for split in (1, 2, 3, 4, 6, 8)
        if m < 2 * M and 256 * split <= K and (split == 1 or 90 < -(-N // n) * -(-M // m) * split <= 400)
    ]  # fmt: skip


def candidates(N: int, K: int, M: int) -> list[Config]:
    """Return configurations worth timing for a weight [N, K] and M rows, the likeliest first."""
    if M <= 1:
        row = [
            config("row", 1, n, HALF, split_of(N, K, n, programs), warps, stages)
            for n, programs, warps, stages in ((64, 528, 4, 2), (32, 1056, 2, 3), (32, 1056, 4, 2))
        ]
        return [*row, *_few(N, K, 16)[:5]]
    few = _few(N, K, max(16, tuning.bucket(M))) if M <= FEW_ROWS else _many(N, K, M)
    few += [LIBRARY | {"algorithm": number} for number in (10, 15, 20)] if M == 64 else []
    return few + (wide_candidates(N, K, M) if 16 < M <= 1024 else [])


def _few(N: int, K: int, block_m: int) -> list[Config]:
    """Return tiles of one block of rows: on one or two warps, or on four or eight with Hopper's instructions.

    The former run out of registers with more than 16 rows; the latter have 64 outputs.
    """
    two = ((32, 1056, 2, 3), (64, 528, 2, 3), (32, 1056, 2, 5), (32, 528, 2, 5), (16, 2112, 1, 4))
    four = ((64, 528, 4, 3), (64, 1056, 4, 3), (128, 264, 8, 3), (128, 528, 8, 3))
    tiles: tuple[tuple[int, int, int, int], ...] = (two[0], four[0], two[1], two[2], four[1], four[2], two[3], two[4])
    if block_m > 16:
        tiles = (*four, (64, 264, 4, 4), (128, 264, 4, 3), two[0])
    return [config("dot", block_m, n, HALF, split_of(N, K, n, programs), w, s) for n, programs, w, s in tiles]


def _many(N: int, K: int, M: int) -> list[Config]:
    tiles = ((64, 128, 8, 3), (128, 128, 8, 3), (128, 64, 4, 3), (64, 64, 4, 4), (64, 128, 4, 3), (128, 128, 8, 2))
    splits = sorted({1, split_of(N, K, 128, 264)}) if M <= 128 else [1]
    ours = [config("dot", m, n, HALF, split, w, s) for m, n, w, s in tiles for split in splits]
    library = [LIBRARY | {"algorithm": number} for number in LIBRARY_ALGORITHMS]
    return [*library, *ours[: 4 if M <= 256 else 0], DENSE]


def default(N: int, K: int, M: int, library: bool) -> Config:
    """Return a good guess where nothing was measured; ``library``: the weight is in cuSPARSELt's format as well."""
    if 1 < M <= 16:
        return config("dot", 16, 64, HALF, split_of(N, K, 64), 2, 3)
    if M <= FEW_ROWS:
        return candidates(N, K, M)[0]
    if library and M > 128:
        return LIBRARY if M <= 1024 else LIBRARY | {"algorithm": 17}
    return config("dot", 64, 128, HALF, split_of(N, K, 128, 264), 8, 3) if M <= 256 else DENSE


def chosen(
    N: int, K: int, M: int, width: int, dtype: torch.dtype, device: torch.device, library: bool, is_wide: bool
) -> Config:  # fmt: skip
    """Return the configuration for ``M`` rows; cuSPARSELt and ``wide_kernel`` only where they can run."""
    paths = {"library": library, "wide": is_wide}
    usable = lambda found: paths.get(found["path"], True)  # noqa: E731
    guess = lambda rows: default(N, K, rows, library)  # noqa: E731
    op = "sparse24" if width == 16 else f"sparse24-{width}-bit"
    return tuning.choose(op, (N, K, width), M, dtype, device, guess, usable, (library, is_wide))
