"""From tensors to launches: which kernels of ``hf_optim::llm_int8`` run for a number of rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.dense import as_rows, empty_product
from ..common.gemm import schedule
from ..common.launch import is_aligned, is_interpreted, launch
from ..common.splitk import new_semaphores, parts_memory
from ..w8a8.tiles import decode_block
from .gemm import CHUNK, grouped_kernel, persistent_kernel, prepare_kernel
from .kernel import decode_kernel, list_kernel, rows_kernel
from .naive import PackedTensors
from .tiles import semaphores_size, tiles_for

# Columns that are multiplied at a time where outliers are; a power of two.
_PIECE = 64
_REAL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


def semaphores_for(N: int, K: int, device: torch.device) -> Tensor:
    """Return zeros that a call uses and leaves zero: a semaphore per tile, and a byte per column."""
    return new_semaphores(semaphores_size(N, K), device)


def llm_int8(x: Tensor, weight: PackedTensors, threshold: float, tiles: dict[str, Any] | None = None) -> Tensor:
    """Return the product for ``x`` [..., in]: [..., out]. See ``naive``."""
    flat = as_rows(x).contiguous()
    (M, K), N = flat.shape, weight.weight.shape[0]
    if not M or not K or not N:
        return empty_product(x.shape[:-1], N, weight.bias, x.dtype, x.device)
    tiles = tiles or tiles_for(M, N, K, x.dtype, x.device)
    y = (_decode if "SPLIT" in tiles else _gemm)(flat, weight, threshold, tiles)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)


def quantize(
    x: Tensor, threshold: float, semaphores: Tensor, N: int, span: int = 0
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return codes [M, in], scales [M], and the positions of outliers.

    With ``span``: words [M] (int64) with a bit per ``span`` columns. Else the outlying columns (int32 [in], the first
    ``count`` of them) and ``count`` [1]. The other tensors are empty.
    """
    M, K = x.shape
    codes = torch.empty(M, K, dtype=torch.int8, device=x.device)
    scale = torch.empty(M, dtype=torch.float32, device=x.device)
    words = torch.empty(M if span else 0, dtype=torch.int64, device=x.device)
    columns = torch.empty(0 if span else K, dtype=torch.int32, device=x.device)
    count = torch.empty(0 if span else 1, dtype=torch.int32, device=x.device)
    block = max(16, span, triton.next_power_of_2(K))
    warps = min(16, max(1, block // 512))
    flags = semaphores[semaphores_size(N, 0) :].view(torch.uint8)
    constants = {"FLAGS": not span, "SPAN": max(1, span), "BLOCK": block}
    key = (*constants.values(), x.dtype, K, is_aligned(x), is_aligned(flags))
    args = (x, codes, scale, words, flags, threshold, K)
    launch(rows_kernel, (M, 1, 1), args, constants, num_warps=warps, num_stages=1, key=key)
    if not span:
        scan = {"SCAN": min(block, 8192)}
        key = (block, K, is_aligned(flags))
        launch(list_kernel, (1, 1, 1), (columns, count, flags, K), scan, num_warps=16, num_stages=1, key=key)
    return codes, scale, words, columns, count


def _real(dtype: torch.dtype) -> Any:
    # The interpreter has no bfloat16 arithmetic.
    return tl.float32 if is_interpreted(decode_kernel) else _REAL[dtype]


def _decode(x: Tensor, weight: PackedTensors, threshold: float, tiles: dict[str, Any]) -> Tensor:
    """Return the product by the kernel for few rows."""
    (M, K), (w, w_scale, bias, semaphores) = x.shape, weight
    N, block_m = w.shape[0], decode_block(M)
    block_n, block_k, split = tiles["BLOCK_N"], tiles["BLOCK_K"], tiles["SPLIT"]
    warps, stages, rows = tiles["num_warps"], tiles["num_stages"], 1 if M == 1 else block_m
    whole = triton.next_power_of_2(K)
    span = max(_PIECE, whole // 64)
    every = sum(1 << place for place in range(0, 64, split))
    every -= (1 << 64) * (every >> 63)  # as int64
    # Parameters that the kernel does not read take any address.
    codes, scale, words = x, w_scale, semaphores
    if tiles["PREQUANT"]:
        codes, scale, words, _, _ = quantize(x, threshold, semaphores, N, span)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    blocks = -(-N // block_n)
    partial = parts_memory(y, blocks, split, block_m * block_n, torch.float32)
    constants = {
        "QUANTIZED": bool(tiles["PREQUANT"]), "HAS_BIAS": bias is not None, "EVEN": K % block_k == 0,
        "REAL": _real(x.dtype), "ROWS": rows, "GRID_BLOCK": max(span, min(whole, 16384 // rows)), "SPAN": span,
        "PIECE": _PIECE, "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
        "EVERY": every,
    }  # fmt: skip
    bias = w_scale if bias is None else bias
    args = (x, codes, scale, words, w, w_scale, bias, y, partial, semaphores, threshold, M, N, K)
    key = (*constants.values(), warps, stages, N, K, x.dtype, bias.dtype, is_aligned(*args[:7], semaphores))
    launch(decode_kernel, (blocks, split, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def _gemm(x: Tensor, weight: PackedTensors, threshold: float, tiles: dict[str, Any]) -> Tensor:
    """Return the product by a kernel for many rows."""
    (M, K), (w, w_scale, bias, semaphores) = x.shape, weight
    N = w.shape[0]
    codes, scale, _, columns, count = quantize(x, threshold, semaphores, N)
    rests, chosen = x, x
    if tiles["PREPARED"]:
        rests, chosen = _prepare(x, codes, scale, w, columns, count)
    y = torch.empty(M, N, dtype=x.dtype, device=x.device)
    is_persistent, programs, constants, options = schedule(tiles, codes, w, semaphores_size(N, 0))
    parts, size = constants.get("PARTS", 1), constants["BLOCK_M"] * constants["BLOCK_N"]
    partial = parts_memory(y, programs, parts, size, torch.int32)
    constants = {
        "HAS_BIAS": bias is not None, "PREPARED": bool(tiles["PREPARED"]), "REAL": _real(x.dtype), **constants
    }  # fmt: skip
    bias = w_scale if bias is None else bias
    args = (x, codes, scale, w, w_scale, bias, columns, count, rests, chosen, y, partial, semaphores, M, N, K)
    key = (*constants.values(), *options.values(), N, K, x.dtype, bias.dtype, is_aligned(*args[:6]))
    kernel: Any = persistent_kernel if is_persistent else grouped_kernel
    launch(kernel, (programs, parts, 1), args, constants, **options, key=key)
    return y


def _prepare(
    x: Tensor, codes: Tensor, scale: Tensor, weight: Tensor, columns: Tensor, count: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the operands of the first step of ``gemm.store_corrected``: [M, CHUNK] and [N, CHUNK]."""
    (M, K), N, rows = x.shape, weight.shape[0], 64
    rests = torch.empty(M, CHUNK.value, dtype=x.dtype, device=x.device)
    chosen = torch.empty(N, CHUNK.value, dtype=x.dtype, device=x.device)
    args = (x, codes, scale, weight, columns, count, rests, chosen, M, N, K)
    constants = {"REAL": _real(x.dtype), "ROWS": rows}
    key = (*constants.values(), x.dtype, N, K, is_aligned(x, weight))
    grid = -(-M // rows) + -(-N // rows)
    launch(prepare_kernel, (grid, 1, 1), args, constants, num_warps=4, num_stages=1, key=key)
    return rests, chosen
