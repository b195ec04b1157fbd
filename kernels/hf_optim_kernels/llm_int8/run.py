"""From tensors to launches: tiles of ``hf_optim::llm_int8``."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tuning
from ..launching import aligned, interpreted, launch
from ..w8a8.quantize import as_rows
from ..w8a8.run import empty_product
from ..w8a8.tiles import MOST_DECODE_ROWS
from .kernel import decode_kernel, grouped_kernel, rows_kernel

_DECODE = ("BLOCK_N", "BLOCK_K", "SPLIT", "num_warps", "num_stages")
_GEMM = ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP", "num_warps", "num_stages")
_REAL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_TILES: dict[tuple, dict[str, Any]] = {}


def default(M: int, N: int, K: int) -> dict[str, Any]:
    """A guess at the fastest configuration; ``M`` is a bucket."""
    if M <= MOST_DECODE_ROWS:
        tiles = -(-N // 64)
        split = next(s for s in (1, 2, 4, 8) if tiles * s >= 256 or s == 8 or 1024 * s > K)
        return dict(zip(_DECODE, (64, 256, split, 4, 4 if M <= 32 else 3), strict=True))
    if M <= 512:
        return dict(zip(_GEMM, (128, 128 if M * N >= 1 << 21 else 64, 128, 8, 4, 4), strict=True))
    return dict(zip(_GEMM, (128, 256, 128, 8, 8, 3), strict=True))


def candidates(M: int, N: int, K: int) -> list[dict[str, Any]]:
    """Configurations worth timing, the likeliest first; ``M`` is a bucket."""
    if M > MOST_DECODE_ROWS:
        large = [
            (128, 256, 128, 8, 8, 3), (128, 128, 128, 8, 4, 4), (64, 128, 128, 8, 4, 4), (128, 128, 128, 8, 8, 4),
            (128, 64, 128, 8, 4, 4), (64, 256, 128, 8, 4, 4),
        ]  # fmt: skip
        return [dict(zip(_GEMM, row, strict=True)) for row in large]
    guess = default(M, N, K)["SPLIT"]
    rows = [
        (64, 256, guess, 4, 4), (64, 256, 2 * guess, 4, 3), (64, 128, guess, 4, 6), (64, 256, max(1, guess // 2), 4, 4),
        (128, 128, 2 * guess, 4, 4), (64, 512, guess, 4, 3),
    ]  # fmt: skip
    fitting = [row for row in rows if row[2] == 1 or 2 * row[1] * row[2] <= K]
    return [dict(zip(_DECODE, row, strict=True)) for row in dict.fromkeys(fitting or [(64, 128, 1, 4, 3)])]


def tiles_for(M: int, N: int, K: int, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The tuned configuration for so many rows, else the default one."""
    rows = tuning.bucket(M)
    key = (rows, N, K, dtype, device)
    if key not in _TILES:
        _TILES[key] = tuning.choose("llm-int8", (N, K, rows), dtype, default(rows, N, K), device)
    return _TILES[key]


def counters_for(N: int, K: int, device: torch.device) -> Tensor:
    """Zeros that a call uses and leaves zero: a flag for each column, a counter of rows, a counter for each tile."""
    return torch.zeros(K + 1 + max(1, -(-N // 16)), dtype=torch.int32, device=device)


def llm_int8(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor,
    tiles: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """``x`` [..., in] -> [..., out]; see ``naive``."""
    flat = as_rows(x).contiguous()
    (M, K), N = flat.shape, weight.shape[0]
    if not M or not K or not N:
        return empty_product(x.shape[:-1], N, bias, x.dtype, x.device)
    codes, scale, columns, count = quantize(flat, threshold, counters)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tiles = tiles or tiles_for(M, N, K, x.dtype, x.device)
    # The interpreter has no bfloat16 arithmetic.
    real = tl.float32 if interpreted(decode_kernel) else _REAL[x.dtype]
    constants = {"HAS_BIAS": bias is not None, "EVEN": K % tiles["BLOCK_K"] == 0, "REAL": real}
    operands = (flat, codes, scale, columns, count, weight, w_scale, w_scale if bias is None else bias, y)
    _multiply(flat, operands, tiles, counters, constants, None if bias is None else bias.dtype)
    return y.view(*x.shape[:-1], N)


def quantize(x: Tensor, threshold: float, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes [M, in], scales [M], outlier columns (int32 [in], the first ``count`` of them) and ``count`` [1]."""
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    found = torch.empty(K + 1, dtype=torch.int32, device=x.device)
    columns, count = found[1:], found[:1]
    block = max(16, triton.next_power_of_2(K))
    warps = min(16, max(1, block // 512))
    flags, counter = counters[:K], counters[K : K + 1]
    args = (x, codes, scale, columns, count, flags, counter, threshold, M, K, K)
    launch(
        rows_kernel, (M, 1, 1), args, {"BLOCK": block}, num_warps=warps, num_stages=1,
        key=(x.dtype, K, aligned(x), aligned(counter), aligned(columns)),
    )  # fmt: skip
    return codes, scale, columns, count


def _multiply(
    x: Tensor, operands: tuple[Tensor, ...], tiles: dict[str, Any], counters: Tensor,
    constants: dict[str, Any], bias_type: torch.dtype | None,
) -> None:  # fmt: skip
    weight, y = operands[5], operands[8]
    M, (N, K) = len(x), weight.shape
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    blocks = {name: value for name, value in tiles.items() if name.isupper()}
    marks = aligned(*operands[:3], weight, operands[6], operands[7])
    if "SPLIT" not in tiles:
        constants = constants | blocks
        grid = -(-M // tiles["BLOCK_M"]) * -(-N // tiles["BLOCK_N"])
        key = (*constants.values(), warps, stages, N, K, x.dtype, bias_type, marks)
        args = (*operands, M, N, K)
        launch(grouped_kernel, (grid, 1, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
        return
    block_m, split = max(16, 1 << (M - 1).bit_length()), tiles["SPLIT"]
    constants = constants | {"BLOCK_M": block_m} | blocks
    grid, partial = -(-N // tiles["BLOCK_N"]), y
    if split > 1:
        size = grid * split * tiles["BLOCK_N"] * block_m
        partial = torch.empty(size, dtype=torch.int32, device=x.device)
    arrived = counters[K + 1 :]
    key = (*constants.values(), warps, stages, N, K, x.dtype, bias_type, marks, aligned(arrived))
    args = (*operands, partial, arrived, M, N, K)
    launch(decode_kernel, (grid, split, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
