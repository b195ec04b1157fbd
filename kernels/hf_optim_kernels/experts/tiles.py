"""The tiles of one launch, and how many of them a multiprocessor holds."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

# Bytes of a Hopper GPU, the most that a program may have.
MOST_SHARED = 232_448


class Tiles(NamedTuple):
    """Tiles of one launch.

    Attributes:
        n, k: columns of the output, and of the matrix, that a program takes at a time.
        warps, stages: compile options; stages are loads under way.
        group: blocks of rows that are multiplied together (grouped products).
        halves: multiply a block with few rows as half a tile (grouped products).
        split: programs that share the experts of a token (decoding).
        described: read matrices through tensor descriptors where these can (grouped products).
        persistent: as many programs as run at a time (grouped products of rows in the order of the route).
    """

    n: int
    k: int
    warps: int
    stages: int
    group: int = 8
    halves: bool = False
    split: int = 1
    described: bool = False
    persistent: bool = False


def fitting_stages(stages: int, size: int, shared: int) -> int:
    """Return how many loads of ``size`` bytes may be under way in ``shared`` bytes: ``stages``, or what fits."""
    return max(1, min(stages, shared // size))


@cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program may have on a device."""
    if device.type != "cuda":
        return MOST_SHARED
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", MOST_SHARED))
