"""Tile shapes of LLM.int8(): a good guess, those worth timing, and the tuned ones.

Up to ``MOST_DECODE_ROWS`` rows a configuration is for ``kernel.decode_kernel`` (``PREQUANT``: after a launch that
quantizes the rows); above, ``KERNEL`` names the product of ``gemm``, and with ``PREPARED`` a launch before it gathers
outlying columns.
"""

from __future__ import annotations

from typing import Any

import torch

from ..common import tuning
from ..w8a8 import tiles as w8a8
from ..w8a8.tiles import MOST_DECODE_ROWS

_GEMM = (
    "KERNEL", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "FLATTEN", "PREPARED", "num_warps", "num_stages", "PARTS",
)  # fmt: skip
# In float32 no tensor core multiplies outliers, and what does takes more registers.
_FLOAT32 = dict(zip(_GEMM, ("grouped", 64, 64, 128, 8, 0, 0, 4, 3, 1), strict=True))


def default(M: int, N: int, K: int) -> dict[str, Any]:
    """Return a guess at the fastest configuration, for the product of w8a8 with its tiles; ``M`` is a bucket."""
    guess = w8a8.default(M, N, K, False)
    if M == MOST_DECODE_ROWS:
        # Here the product for many rows is faster already: the other one looks for outliers at every step.
        parts = next((count for count in (1, 2, 3, 4) if -(-N // 64) * count >= 110 and 512 * count <= K), 1)
        return dict(zip(_GEMM, ("grouped", 64, 64, 256, 8, 0, 0, 4, 3, parts), strict=True))
    if M <= MOST_DECODE_ROWS:
        return guess
    # Gathering pays where many tiles read the gathered columns.
    return {name: guess.get(name, int(M > 512)) for name in _GEMM}


def candidates(M: int, N: int, K: int) -> list[dict[str, Any]]:
    """Return configurations worth timing, the likeliest first; ``M`` is a bucket."""
    few = w8a8.candidates(M, N, K, False) if M <= MOST_DECODE_ROWS else []
    kinds = [each for each in w8a8.candidates(max(M, 65), N, K, False) if each["BLOCK_M"] < 2 * max(M, 64)]
    prepared = (1,) if M > 512 else (0,)
    many = [{name: kind.get(name, gather) for name in _GEMM} for kind in kinds for gather in prepared]
    return few + (many if M >= 16 else [])


def tiles_for(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the configuration for ``M`` rows."""
    if dtype == torch.float32 and M > MOST_DECODE_ROWS:
        return _FLOAT32
    # In float32 no tensor core multiplies outliers.
    usable = lambda tiles: dtype != torch.float32 or "SPLIT" in tiles  # noqa: E731
    return tuning.choose("llm-int8", (N, K), M, dtype, device, lambda rows: default(rows, N, K), usable)


def semaphores_size(N: int, K: int) -> int:
    """Return how many int32 zeros a call uses: a semaphore per tile, and a byte per column."""
    return max(1, -(-N // 16)) + -(-K // 4)
