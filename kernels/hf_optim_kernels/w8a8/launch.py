"""From tensors to launches: which kernel runs, and with which tiles, for a number of rows."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..common.dense import as_rows, empty_product
from ..common.gemm import schedule
from ..common.launch import is_aligned, launch
from ..common.launch_plan import prevent_recording
from ..common.splitk import new_semaphores, parts_memory
from .gemm import grouped_kernel, persistent_kernel
from .kernel import decode_kernel
from .naive import FLOAT8, InputGrid, PackedTensors
from .quantize import quantize_rows
from .tiles import MOST_DECODE_ROWS, decode_block, default, tiles_for


def semaphores_for(N: int, device: torch.device) -> Tensor:
    """Return split-k semaphores for a weight of ``N`` rows; a launch leaves them zero."""
    return new_semaphores(-(-N // 16), device)


def linear(x: Tensor, weight: PackedTensors, grid: InputGrid, tiles: dict[str, Any] | None = None) -> Tensor:
    """Quantize ``x`` [..., in] and multiply: [..., out]. See ``naive``."""
    flat = as_rows(x)
    M, K = flat.shape
    N, float8 = weight.weight.shape[0], weight.weight.dtype == FLOAT8
    if not M or not K or not N:
        return empty_product(x.shape[:-1], N, weight.bias, x.dtype, x.device)
    tiles = tiles or tiles_for(M, N, K, float8, x.dtype, x.device)
    if "SPLIT" in tiles and not tiles["PREQUANT"]:
        y = _decode(flat.contiguous(), grid, weight, x.dtype, False, tiles)
    else:
        codes, scale, zero, _ = quantize_rows(flat, float8, grid.is_symmetric, grid.scale, grid.zero)
        y = product(codes, scale, zero, weight, x.dtype, tiles)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)


def linear_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: PackedTensors, dtype: torch.dtype,
    tiles: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Multiply codes [..., in] with scales [...] (and zero points [...], or none): [..., out] in ``dtype``."""
    N, K = weight.weight.shape
    flat = as_rows(codes).contiguous()
    M = flat.shape[0]
    if not M or not K or not N:
        return empty_product(codes.shape[:-1], N, weight.bias, dtype, codes.device)
    tiles = tiles or tiles_for(M, N, K, weight.weight.dtype == FLOAT8, dtype, codes.device)
    zero = None if zero is None or not zero.numel() else zero.reshape(-1)
    return product(flat, scale.reshape(-1), zero, weight, dtype, tiles).view(*codes.shape[:-1], N)


def product(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: PackedTensors, dtype: torch.dtype, tiles: dict[str, Any]
) -> Tensor:  # fmt: skip
    """Return the product of codes [M, in] with one configuration."""
    zero = None if zero is None or not zero.numel() else zero
    if "SPLIT" in tiles:
        return _decode(codes, InputGrid(scale, zero, zero is None), weight, dtype, True, tiles)
    if tiles["KERNEL"] == "torch":
        if zero is None and dtype == torch.bfloat16:
            return scaled_mm(codes, scale, weight)
        N, K = weight.weight.shape
        tiles = default(max(len(codes), MOST_DECODE_ROWS + 1), N, K, False)
    return _gemm(codes, scale, zero, weight, dtype, tiles)


def scaled_mm(codes: Tensor, scale: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``torch._scaled_mm`` with a scale per row of both operands: float8 to bfloat16."""
    prevent_recording()
    return torch._scaled_mm(
        codes, weight.weight.T, scale[:, None], weight.scale[None, :], bias=weight.bias, out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )  # fmt: skip


def _decode(
    x: Tensor, grid: InputGrid, weight: PackedTensors, dtype: torch.dtype, is_quantized: bool, tiles: dict[str, Any]
) -> Tensor:  # fmt: skip
    """Return the product by the kernel for few rows; ``grid`` has the scales of codes, if ``x`` holds codes."""
    (M, K), (codes, w_scale, sums, bias, semaphores) = x.shape, weight
    N, float8, block_m = codes.shape[0], codes.dtype == FLOAT8, decode_block(M)
    block_n, block_k, split = tiles["BLOCK_N"], tiles["BLOCK_K"], tiles["SPLIT"]
    rows, blocks = 1 if M == 1 else block_m, -(-N // block_n)
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    partial = parts_memory(y, blocks, split, block_m * block_n, torch.float32 if float8 else torch.int32)
    constants = {
        "QUANTIZED": is_quantized, "STATIC": not is_quantized and grid.scale is not None, "FLOAT8": float8,
        "ASYMMETRIC": not grid.is_symmetric, "HAS_BIAS": bias is not None, "EPS": torch.finfo(dtype).eps,
        "EVEN": K % block_k == 0, "ROWS": rows, "GRID_BLOCK": max(16, min(4096, triton.next_power_of_2(K)) // rows),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
    }  # fmt: skip
    inputs = _or(bias, w_scale), _or(grid.scale, w_scale), _or(grid.zero, sums)
    args = (x, codes, w_scale, sums, *inputs, y, partial, semaphores, M, N, K)
    types = (x.dtype, dtype, *(t.dtype for t in inputs))
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    key = (*constants.values(), warps, stages, N, K, types, is_aligned(x, codes, w_scale, *inputs))
    launch(decode_kernel, (blocks, split, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def _gemm(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: PackedTensors, dtype: torch.dtype, tiles: dict[str, Any]
) -> Tensor:  # fmt: skip
    """Return the product of codes ``x`` [M, in] by a kernel for many rows."""
    (M, K), (codes, w_scale, sums, bias, semaphores) = x.shape, weight
    N, float8 = codes.shape[0], codes.dtype == FLOAT8
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    is_persistent, programs, constants, options = schedule(tiles, x, codes, semaphores.numel())
    parts, size = constants.get("PARTS", 1), constants["BLOCK_M"] * constants["BLOCK_N"]
    partial = parts_memory(y, programs, parts, size, torch.float32 if float8 else torch.int32)
    constants = {
        "FLOAT8": float8, "ASYMMETRIC": x_zero is not None, "HAS_BIAS": bias is not None, **constants
    }  # fmt: skip
    inputs = _or(bias, w_scale), x_scale, _or(x_zero, sums)
    args = (x, codes, w_scale, sums, *inputs, y, partial, semaphores, M, N, K)
    types = (x.dtype, dtype, inputs[0].dtype, inputs[2].dtype)
    key = (*constants.values(), *options.values(), N, K, types, is_aligned(x, codes, w_scale, *inputs))
    kernel: Any = persistent_kernel if is_persistent else grouped_kernel
    launch(kernel, (programs, parts, 1), args, constants, **options, key=key)
    return y


def _or(tensor: Tensor | None, unused: Tensor) -> Tensor:
    """Return ``tensor``, or an address for a parameter that the kernel does not read."""
    return unused if tensor is None else tensor
