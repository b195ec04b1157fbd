"""Which kernel runs for how many rows, and its tiles."""

from __future__ import annotations

from typing import Any

import torch

from .. import tuning
from .naive import HALF, stored_fours

Config = dict[str, Any]
# More rows than this are a matter of arithmetic, not of bytes.
FEW_ROWS = 64
COUNTERS = 1 << 14


def config(
    path: str, block_m: int, block_n: int, fours: int, split: int, warps: int, stages: int, algorithm: int = 0
) -> Config:
    """A configuration.

    ``path`` is "row", "dot", "library" (cuSPARSELt, with the number of its ``algorithm``) or "dense" (decompress, then
    the dense product).
    """
    names = ("path", "BLOCK_M", "BLOCK_N", "FOURS", "SPLIT", "num_warps", "num_stages", "algorithm")
    return dict(zip(names, (path, block_m, block_n, fours, split, warps, stages, algorithm), strict=True))


DENSE = config("dense", 0, 0, 0, 1, 0, 0)
LIBRARY = config("library", 0, 0, 0, 1, 0, 0)


def split_of(N: int, K: int, block_n: int, tiles: int = 512) -> int:
    """Programs that share the columns of a tile, for about ``tiles`` programs, each with two chunks or more."""
    chunks = stored_fours(K) // (2 * HALF)
    wanted = max(1, round(tiles / -(-N // block_n)))
    return max(1, min(wanted, chunks // 2, 16))


def candidates(N: int, K: int, M: int) -> list[Config]:
    """Configurations worth timing for a weight [N, K] and M rows, the likeliest first."""
    if M <= 1:
        row = [
            config("row", 1, n, HALF, split_of(N, K, n, programs), warps, stages)
            for n, programs, warps, stages in ((64, 528, 4, 2), (32, 1056, 2, 3), (32, 1056, 4, 2))
        ]
        return [*_few(N, K, 16)[:4], *row, *_few(N, K, 16)[4:5]]
    return _few(N, K, max(16, tuning.bucket(M))) if M <= FEW_ROWS else _many(N, K, M)


def _few(N: int, K: int, block_m: int) -> list[Config]:
    """Tiles of one block of rows: on one or two warps, or on four or eight with Hopper's instructions for 64 outputs.

    The former runs out of registers with more than 16 rows.
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
    return [LIBRARY, *ours[: 6 if M <= 256 else 2], DENSE]


def default(N: int, K: int, M: int, library: bool) -> Config:
    """A good guess where nothing was measured; ``library``: the weight is in cuSPARSELt's format too."""
    if M <= FEW_ROWS:
        return candidates(N, K, M)[0]
    if library and M > 128:
        return LIBRARY
    return config("dot", 64, 128, HALF, split_of(N, K, 128, 264), 8, 3) if M <= 256 else DENSE


def chosen(N: int, K: int, M: int, width: int, dtype: torch.dtype, library: bool, device: torch.device) -> Config:
    """The configuration for M rows. The tuned one, unless it asks for a library that cannot serve this weight."""
    rows = tuning.bucket(M)
    guess = default(N, K, rows, library)
    found = tuning.choose("sparse24", (N, K, width, rows), dtype, guess, device)
    return guess if found["path"] == "library" and not library else found
