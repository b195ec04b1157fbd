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

_DECODE = ("BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages", "PREQUANT")
_GEMM = ("KERNEL", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "FLATTEN", "PREPARED", "num_warps", "num_stages")
# In float32 no tensor core multiplies outliers, and what does takes more registers.
_FLOAT32 = dict(zip(_GEMM, ("grouped", 64, 64, 128, 8, 0, 0, 4, 3), strict=True))


def default(M: int, N: int, K: int) -> dict[str, Any]:
    """Return a guess at the fastest configuration, for the product of w8a8 with its tiles; ``M`` is a bucket."""
    guess = w8a8.default(M, N, K, False)
    if M <= MOST_DECODE_ROWS:
        return guess
    # Gathering pays where many tiles read the gathered columns.
    return {name: guess.get(name, int(M > 512)) for name in _GEMM}


def candidates(M: int, N: int, K: int) -> list[dict[str, Any]]:
    """Return configurations worth timing, the likeliest first; ``M`` is a bucket."""
    if M <= MOST_DECODE_ROWS:
        return w8a8.candidates(M, N, K, False)
    if M <= 512:
        rows = [
            ("grouped", 64, 128, 128, 8, 0, 0, 4, 4), ("grouped", 64, 128, 128, 8, 0, 1, 4, 4),
            ("grouped", 64, 64, 256, 8, 0, 0, 4, 3), ("grouped", 64, 64, 256, 8, 0, 1, 4, 3),
            ("grouped", 128, 64, 128, 8, 0, 0, 4, 4), ("grouped", 128, 256, 128, 8, 0, 0, 8, 3),
            ("grouped", 128, 128, 128, 8, 0, 0, 4, 4),
        ]  # fmt: skip
    else:
        rows = [
            ("persistent", 256, 128, 128, 8, 0, 1, 8, 4), ("persistent", 256, 128, 128, 8, 0, 0, 8, 4),
            ("persistent", 128, 256, 128, 8, 0, 1, 8, 4), ("persistent", 128, 256, 128, 8, 1, 1, 8, 3),
            ("grouped", 128, 256, 128, 8, 0, 1, 8, 3), ("grouped", 128, 128, 128, 8, 0, 1, 4, 4),
            ("persistent", 256, 128, 128, 8, 0, 1, 8, 3),
        ]  # fmt: skip
    return [dict(zip(_GEMM, row, strict=True)) for row in rows]


def tiles_for(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the tuned configuration for ``M`` rows, else the default one."""
    rows = tuning.bucket(M)
    found = tuning.cached_choice("llm-int8", (N, K, rows), dtype, device, lambda: default(rows, N, K))
    return _FLOAT32 if dtype == torch.float32 and "SPLIT" not in found else found


def semaphores_size(N: int, K: int) -> int:
    """Return how many int32 zeros a call uses: a semaphore per tile, and a byte per column."""
    return max(1, -(-N // 16)) + -(-K // 4)
