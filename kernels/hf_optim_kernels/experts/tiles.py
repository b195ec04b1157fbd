"""The tiles of one launch."""

from __future__ import annotations

from typing import NamedTuple


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
