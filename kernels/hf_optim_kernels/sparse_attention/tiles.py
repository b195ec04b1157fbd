"""The tiles of each launch, by block, head size and type, and how long a piece of a list may be."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from ..common import tuning

# Directions that have tiles: the names in tuning tables are ``sparse_attention_<direction>``.
FORWARD, QUERIES, KEYS = "forward", "queries", "keys"
# Programs that a multiprocessor runs at once by block, for the registers that they need; the fewest keys of a piece.
RESIDENT, LEAST_KEYS = {32: 6, 64: 3, 128: 1}, 1024
MOST_PIECE = 128


class Tiles(NamedTuple):
    """Tiles of one launch.

    Attributes:
        step: places of the other side that a program reads at a time; divides the block.
        warps, stages: compile options; stages are loads under way.
        registers: most registers of a thread; 0: as many as the compiler takes.
    """

    step: int
    warps: int
    stages: int
    registers: int = 0


@cache
def padded(size: int) -> int:
    """Return the columns of a tile for a head size."""
    return max(16, triton.next_power_of_2(size))


def tiles(direction: str, block: int, D: int, DV: int, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return the tiles of a launch: those of a tuning table (``sparse_attention_forward 64x64x64x1``), else a guess."""
    sizes = (padded(D), padded(DV))

    def guess(_: int) -> dict[str, int]:
        return guessed(direction, block, max(sizes), dtype)._asdict()

    def usable(config: dict[str, int]) -> bool:
        return block % config["step"] == 0 and config["step"] >= 16

    name = f"sparse_attention_{direction}"
    return Tiles(**tuning.choose(name, (block, *sizes), 1, dtype, device, guess, usable))


def guessed(direction: str, block: int, size: int, dtype: torch.dtype) -> Tiles:
    """Return tiles for Hopper, as they were fastest on an H200 for heads of 64 and of 128.

    A warp group of four warps takes 64 rows, and a tile of 64 x 64 float32 is 32 registers of a thread. The forward
    holds two of them, the gradient of queries three, that of keys and values four. With at most 128 registers a thread,
    four programs of the forward share a multiprocessor instead of three, which is worth 8 % for heads of 64; the
    gradients spill and become slower. Blocks of 128 are read in steps of 64 keys by four warps where the results of a
    program leave registers for it.
    """
    if dtype == torch.float32:  # multiplied outside of the tensor cores
        return Tiles(32 if size < 64 else 16, 4 if block <= 64 else 8, 1)
    step, small = min(block, 64), size <= 64
    if block == 32:
        return Tiles(32, 2, 3)
    if direction == FORWARD:
        if block == 64:
            return Tiles(step, 4, 3, 128 if small else 0)
        return Tiles(step, 4, 3) if small else Tiles(128, 8, 2)
    if direction == QUERIES:
        if block == 64:
            return Tiles(step, 4, 3 if small else 2)
        return Tiles(32, 8, 3) if small else Tiles(step, 8, 2)
    if block == 64:
        return Tiles(step if small else 32, 4, 2)
    return Tiles(step, 8, 2)


@cache
def processors(device: torch.device) -> int:
    """Return the number of multiprocessors."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def piece(pairs: int, entries: int, blocks: int, block: int, multiprocessors: int) -> int:
    """Return how many entries a piece of a list has at most: a power of two, so that few plans are made.

    Args:
        pairs: batch rows times query heads.
        entries: of the lists of a head.
        blocks: of queries: the number of lists of a head.
        block: places of a block.
    """
    slots = RESIDENT.get(block, 1) * multiprocessors
    # Half of what each running program has to do, so that the last ones end about together.
    size = 1 << max(0, int(pairs * entries / slots / 2).bit_length() - 1)
    if pairs * blocks >= slots:  # lists of the usual length are not cut: that would only add results to merge
        size = max(size, 1 << (5 * entries // (4 * max(1, blocks))).bit_length())
    return max(LEAST_KEYS // block, min(MOST_PIECE, size))
