"""From tensors to launches: which kernels of ``hf_optim::llm_int8`` for so many rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch_plan import aligned, interpreted
from ..w8a8.launch import allow_descriptors, empty_product, processors, readable
from ..w8a8.plans import launch
from ..w8a8.quantize import as_rows
from ..w8a8.tiles import MOST_DECODE_ROWS
from .gemm import CHUNK, grouped_kernel, persistent_kernel, prepare_kernel
from .kernel import decode_kernel, list_kernel, rows_kernel
from .tiles import counters_size, tiles_for

# Columns that are multiplied at a time where outliers are; a power of two.
_PIECE = 64
_REAL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def counters_for(N: int, K: int, device: torch.device) -> Tensor:
    """Zeros that a call uses and leaves zero: a counter for each tile and a byte for each column."""
    return torch.zeros(counters_size(N, K), dtype=torch.int32, device=device)


def llm_int8(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor,
    tiles: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """``x`` [..., in] -> [..., out]; see ``naive``."""
    flat = as_rows(x).contiguous()
    (M, K), N = flat.shape, weight.shape[0]
    if not M or not K or not N:
        return empty_product(x.shape[:-1], N, bias, x.dtype, x.device)
    tiles = tiles or tiles_for(M, N, K, x.dtype, x.device)
    product = _decode if "SPLIT" in tiles else _gemm
    y = product(flat, weight, w_scale, bias, threshold, counters, tiles)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)


def quantize(
    x: Tensor, threshold: float, counters: Tensor, N: int, span: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Codes [M, in], scales [M], and where the outliers are.

    With ``span``: words [M] (int64) with a bit for so many columns each. Else the outlying columns (int32 [in], the
    first ``count`` of them) and ``count`` [1]. What is not asked for is not written.
    """
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    words = torch.empty(M if span else 0, dtype=torch.int64, device=x.device)
    columns = torch.empty(0 if span else K, dtype=torch.int32, device=x.device)
    count = torch.empty(0 if span else 1, dtype=torch.int32, device=x.device)
    block = max(16, span, triton.next_power_of_2(K))
    warps = min(16, max(1, block // 512))
    flags = counters[counters_size(N, 0) :].view(torch.uint8)
    constants = {"FLAGS": not span, "SPAN": max(1, span), "BLOCK": block}
    key = (*constants.values(), x.dtype, K, aligned(x), aligned(flags))
    args = (x, codes, scale, words, flags, threshold, K)
    launch(rows_kernel, (M, 1, 1), args, constants, num_warps=warps, num_stages=1, key=key)
    if not span:
        scan = {"SCAN": min(block, 8192)}
        key = (block, K, aligned(flags))
        launch(list_kernel, (1, 1, 1), (columns, count, flags, K), scan, num_warps=16, num_stages=1, key=key)
    return codes, scale, words, columns, count


def _real(dtype: torch.dtype) -> Any:
    # The interpreter has no bfloat16 arithmetic.
    return tl.float32 if interpreted(decode_kernel) else _REAL[dtype]


def _decode(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor,
    tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    if M > MOST_DECODE_ROWS:
        raise ValueError(f"{M} rows; this kernel takes {MOST_DECODE_ROWS}")
    block_m = max(16, 1 << (M - 1).bit_length())
    block_n, block_k, split = tiles["BLOCK_N"], tiles["BLOCK_K"], tiles["SPLIT"]
    warps, stages, rows = tiles["num_warps"], tiles["num_stages"], 1 if M == 1 else block_m
    whole = triton.next_power_of_2(K)
    span = max(_PIECE, whole // 64)
    every = sum(1 << bit for bit in range(0, 64, split))
    every -= (1 << 64) * (every >> 63)  # as int64
    # What is not used is an address like any other.
    codes, scale, words = x, w_scale, counters
    if tiles["PREQUANT"]:
        codes, scale, words, _, _ = quantize(x, threshold, counters, N, span)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    grid, partial = -(-N // block_n), y
    if split > 1:
        partial = torch.empty(grid * split * block_n * block_m, dtype=torch.float32, device=x.device)
    constants = {
        "QUANTIZED": bool(tiles["PREQUANT"]), "HAS_BIAS": bias is not None, "EVEN": K % block_k == 0,
        "REAL": _real(x.dtype), "ROWS": rows, "GRID_BLOCK": max(span, min(whole, 16384 // rows)), "SPAN": span,
        "PIECE": _PIECE, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
        "EVERY": every,
    }  # fmt: skip
    bias = w_scale if bias is None else bias
    args = (x, codes, scale, words, weight, w_scale, bias, y, partial, counters, threshold, M, N, K)
    key = (*constants.values(), warps, stages, N, K, x.dtype, bias.dtype, aligned(*args[:7], counters))
    launch(decode_kernel, (grid, split, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def _gemm(
    x: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None, threshold: float, counters: Tensor,
    tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    codes, scale, _, columns, count = quantize(x, threshold, counters, N)
    constants = {"HAS_BIAS": bias is not None, "PREPARED": bool(tiles["PREPARED"]), "REAL": _real(x.dtype)}
    rests, chosen = x, x
    if tiles["PREPARED"]:
        rests, chosen = _prepare(x, codes, scale, weight, columns, count)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    tiles = readable(tiles, codes, weight)
    block = {name: tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    programs = -(-M // block["BLOCK_M"]) * -(-N // block["BLOCK_N"])
    persistent = tiles["KERNEL"] == "persistent"
    if persistent:
        allow_descriptors()
        most = processors(x.device)
        constants |= {"PROGRAMS": most, "FLATTEN": bool(tiles["FLATTEN"])}
        programs = min(programs, most)
    else:
        constants |= {"EVEN": K % block["BLOCK_K"] == 0}
    constants |= block
    bias = w_scale if bias is None else bias
    args = (x, codes, scale, weight, w_scale, bias, columns, count, rests, chosen, y, M, N, K)
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    key = (*constants.values(), warps, stages, N, K, x.dtype, bias.dtype, aligned(*args[:6]))
    kernel: Any = persistent_kernel if persistent else grouped_kernel
    launch(kernel, (programs, 1, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def _prepare(
    x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, columns: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """The operands of ``gemm.store_corrected``'s first step: [M, CHUNK] and [N, CHUNK]."""
    (M, K), N, rows = x.shape, weight.shape[0], 64
    rests = torch.empty(M, CHUNK.value, dtype=x.dtype, device=x.device)
    chosen = torch.empty(N, CHUNK.value, dtype=x.dtype, device=x.device)
    args = (x, codes, scale, weight, columns, count, rests, chosen, M, N, K)
    constants = {"REAL": _real(x.dtype), "ROWS": rows}
    key = (*constants.values(), x.dtype, N, K, aligned(x, weight))
    grid = -(-M // rows) + -(-N // rows)
    launch(prepare_kernel, (grid, 1, 1), args, constants, num_warps=4, num_stages=1, key=key)
    return rests, chosen
