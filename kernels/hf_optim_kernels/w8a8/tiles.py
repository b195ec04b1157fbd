"""Tile shapes of the 8-bit products: a good guess, those worth timing, and the tuned ones.

Up to ``MOST_DECODE_ROWS`` rows a configuration is for ``decode_kernel``: with ``PREQUANT``, a separate launch quantizes
first, which pays where quantizing the same rows in every program costs more than a launch. Above, ``KERNEL`` names the
product: ``grouped``, ``persistent`` or ``torch`` (``torch._scaled_mm``; float8 only).
"""

from __future__ import annotations

from typing import Any

import torch

from ..common import tuning

MOST_DECODE_ROWS = 64
_DECODE = ("BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages", "PREQUANT")
_GEMM = (
    "KERNEL", "BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "HALVES", "FLATTEN", "num_warps", "num_stages", "PARTS",
)  # fmt: skip


def decode_block(M: int) -> int:
    """Return ``BLOCK_M`` of the kernel for few rows. Raises ``ValueError`` above ``MOST_DECODE_ROWS``."""
    if M > MOST_DECODE_ROWS:
        raise ValueError(f"{M} rows are too many for this kernel, which takes up to {MOST_DECODE_ROWS}")
    return max(16, 1 << (M - 1).bit_length())


def default(M: int, N: int, K: int, float8: bool) -> dict[str, Any]:
    """Return a guess at the fastest configuration; ``M`` is a bucket."""
    if M <= MOST_DECODE_ROWS:
        return dict(zip(_DECODE, _decode_default(M, N, K, float8), strict=True))
    if M <= 512:
        # Two programs per multiprocessor hide each other's latency, if necessary with smaller tiles.
        small = -(-M // 64) * -(-N // 128) < 264
        row = ("grouped", 64, 64, 256, 8, 0, 0, 4, 3, 1) if small else ("grouped", 64, 128, 128, 8, 0, 0, 4, 4, 1)
    else:
        row = ("persistent", 256, 128, 128, 8, 0, 0, 8, 4, 1)
    if float8 and N % 16 == 0 and K % 16 == 0 and (M > 512 or N * K > 1 << 25):
        row = ("torch", 128, 128, 128, 8, 0, 0, 4, 4, 1)
    return dict(zip(_GEMM, row, strict=True))


def _decode_default(M: int, N: int, K: int, float8: bool) -> tuple[int, ...]:
    """Return tiles with enough programs to keep every multiprocessor reading; one row is quantized where multiplied."""
    blocks = -(-N // 64)
    wanted = 256 if 1 < M < 64 else 200 if M == 1 else 128
    split = next(s for s in (1, 2, 4, 8) if blocks * s >= wanted or s == 8 or 1024 * s > K)
    if float8 and M == 64:
        return 64, 128, max(split, min(2 * split, 8)) if 512 * split <= K else split, 4, 6, 1
    return 64, 256, split, 4, 4, int(M > 1)


def candidates(M: int, N: int, K: int, float8: bool) -> list[dict[str, Any]]:
    """Return configurations worth timing, the likeliest first; ``M`` is a bucket."""
    if M <= MOST_DECODE_ROWS:
        return _decode_candidates(M, N, K)
    kinds = [
        ("grouped", 64, 128, 128, 4, 4), ("grouped", 64, 64, 256, 4, 3), ("grouped", 128, 128, 128, 4, 4),
        ("grouped", 128, 128, 128, 8, 4), ("grouped", 128, 64, 128, 4, 4), ("grouped", 128, 256, 128, 8, 3),
        ("grouped", 128, 128, 128, 4, 3), ("grouped", 128, 128, 128, 8, 3), ("grouped", 256, 128, 128, 8, 3),
    ]  # fmt: skip
    rows: list[tuple[Any, ...]] = []
    if M <= 1024:
        rows += [
            (kernel, m, n, k, 8, 0, 0, warps, stages, parts)
            for kernel, m, n, k, warps, stages in kinds
            for parts in (1, 2, 3, 4, 6)
            if m < 2 * M and (parts == 1 or (90 < -(-M // m) * -(-N // n) * parts <= 400 and 4 * k * parts <= K))
        ]
    if M >= 256:
        rows += [
            ("persistent", 128, 256, 128, 8, 0, 0, 8, 4, 1),
            ("persistent", 128, 256, 128, 8, 1, 1, 8, 3, 1),
            ("persistent", 128, 128, 128, 8, 0, 1, 8, 4, 1),
            ("persistent", 256, 128, 128, 8, 0, 0, 8, 4, 1),
        ]
    if float8:
        rows.insert(0, ("torch", 128, 128, 128, 8, 0, 0, 4, 4, 1))
    return [dict(zip(_GEMM, row, strict=True)) for row in rows]


def _decode_candidates(M: int, N: int, K: int) -> list[dict[str, Any]]:
    whole = -(-N // 64)
    split = next(s for s in (1, 2, 4, 8) if whole * s >= 256 or s == 8)
    more, less = min(split * 2, 16), max(split // 2, 1)
    fused = 0 if M <= 16 else 1
    rows = [
        (64, 256, split, 4, 4, fused),
        (64, 256, split, 4, 4, 1),
        (64, 256, more, 4, 3, fused),
        (64, 128, split, 4, 6, 1),
        (64, 256, less, 4, 4, fused),
        (128, 128, more, 4, 4, 1),
        (32, 256, less, 4, 4, fused),
        (64, 512, split, 4, 3, 1),
        (128, 256, more, 8, 3, 1),
        (128, 128, split, 4, 4, 1),
        (64, 256, min(2 * more, 16), 4, 3, 1),
        (128, 256, split, 8, 3, 1),
    ]
    # A part of a tile has at least two blocks of columns.
    fitting = [row for row in rows if row[2] == 1 or 2 * row[1] * row[2] <= K]
    return [dict(zip(_DECODE, row, strict=True)) for row in dict.fromkeys(fitting or [(64, 128, 1, 4, 3, fused)])]


def tiles_for(M: int, N: int, K: int, float8: bool, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """Return the configuration for ``M`` rows; ``dtype`` is that of the output."""
    is_torch_usable = N % 16 == 0 and K % 16 == 0 and dtype == torch.bfloat16
    usable = lambda tiles: is_torch_usable or tiles.get("KERNEL") != "torch"  # noqa: E731
    guess = lambda rows: default(rows, N, K, float8)  # noqa: E731
    return tuning.choose(op_name(float8), (N, K), M, dtype, device, guess, usable, is_torch_usable)


def op_name(float8: bool) -> str:
    """Return the name of the product in tuned tables."""
    return "w8a8-float8" if float8 else "w8a8-int8"
