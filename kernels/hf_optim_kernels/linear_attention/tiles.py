"""The tiles of each launch, by the sizes of heads and features, and by type."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton

from ..common import tuning

# Directions that have tiles: the names in tuning tables are ``linear_attention_<direction>``.
FORWARD, BACKWARD = "forward", "backward"
# Chunks that a program of the scan adds up at once, and entries of a state.
SCANNED, ENTRIES = 16, 256


class Tiles(NamedTuple):
    """Tiles of the launches of one direction.

    Attributes:
        chunk: tokens of a chunk: pairs within it are computed one by one, and a state is kept for each.
        features: rows of W that a program reads at a time.
        warps, stages: compile options; stages are loads under way.
    """

    chunk: int
    features: int
    warps: int
    stages: int


@cache
def padded(size: int) -> int:
    """Return the columns of a tile for a head size."""
    return max(16, triton.next_power_of_2(size))


def tiles(direction: str, m: int, D: int, DV: int, trig: bool, dtype: torch.dtype, device: torch.device) -> Tiles:
    """Return the tiles of a direction: those of a tuning table, else a guess.

    An entry is ``linear_attention_forward 128x64x64x1``: features (2 m of kind trig), and heads of keys and values.
    """
    sizes = (m * (1 + trig), padded(D), padded(DV))

    def guess(_: int) -> dict[str, int]:
        return guessed(direction, m, max(sizes[1:]), trig, dtype)._asdict()

    def usable(config: dict[str, int]) -> bool:
        return min(config["chunk"], config["features"]) >= 16

    return Tiles(**tuning.choose(f"linear_attention_{direction}", sizes, 1, dtype, device, guess, usable))


def guessed(direction: str, m: int, size: int, trig: bool, dtype: torch.dtype) -> Tiles:
    """Return tiles for Hopper: a tile of 64 x 64 float32 is 32 registers of each thread of four warps.

    Within a chunk the output holds two such tiles and makes two more of features; the gradient of keys holds four, so
    that of heads of 64 with four warps 600 bytes of a thread were spilled. In half precision the backward, and the
    forward of heads above 64, read 64 rows of W at a time, spilled or not: with 32, Triton 3.6 compiles them to code
    that reads addresses that are not there.
    """
    half = dtype != torch.float32
    least = 16 if not half else 32 if direction == FORWARD and size <= 64 else 64
    block = max(least, min(32 if trig else 64, triton.next_power_of_2(m)))
    if not half:  # multiplied outside of the tensor cores
        return Tiles(32, min(block, 32), 8, 1)
    warps = 4 if direction == FORWARD and size <= 64 else 8
    return Tiles(64, block, warps, 2 if direction == FORWARD and size <= 64 else 1)
