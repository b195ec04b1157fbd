"""From tensors to launches: which kernel with which tiles for so many rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.launch_plan import aligned
from .gemm import grouped_kernel, persistent_kernel
from .kernel import decode_kernel
from .naive import FLOAT8
from .plans import launch, unplanned
from .quantize import as_rows, rows
from .tiles import MOST_DECODE_ROWS, WITHOUT_DESCRIPTORS, default, tiles_for


def counters_for(N: int, device: torch.device) -> Tensor:
    """Zeros that count the finished programs of each tile; a launch leaves them zero."""
    return torch.zeros(max(1, -(-N // 16)), dtype=torch.int32, device=device)


def linear(
    x: Tensor, weight: Tensor, w_scale: Tensor, w_sum: Tensor, bias: Tensor | None, x_scale: Tensor | None,
    x_zero: Tensor | None, counters: Tensor, symmetric: bool, tiles: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Quantize ``x`` [..., in] (dynamically where ``x_scale`` is None) and multiply: [..., out]. See ``naive``."""
    flat = as_rows(x)
    M, K = flat.shape
    N, float8 = weight.shape[0], weight.dtype == FLOAT8
    if not M or not K or not N:
        return empty_product(x.shape[:-1], N, bias, x.dtype, x.device)
    tiles = tiles or tiles_for(M, N, K, float8, x.dtype, x.device)
    if "SPLIT" in tiles and not tiles["PREQUANT"]:
        flat = flat.contiguous()
        y = _decode(flat, x_scale, x_zero, weight, w_scale, w_sum, bias, counters, x.dtype, symmetric, False, tiles)
    else:
        codes, scale, zero, _ = rows(flat, float8, symmetric, x_scale, x_zero)
        y = product(codes, scale, zero, weight, w_scale, w_sum, bias, counters, x.dtype, tiles)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], N)


def linear_codes(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, counters: Tensor, dtype: torch.dtype, tiles: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Multiply codes [..., in] with scales [...] (and zero points [...], or none): [..., out] in ``dtype``."""
    N, K = weight.shape
    flat = as_rows(codes).contiguous()
    M = flat.shape[0]
    if not M or not K or not N:
        return empty_product(codes.shape[:-1], N, bias, dtype, codes.device)
    tiles = tiles or tiles_for(M, N, K, weight.dtype == FLOAT8, dtype, codes.device)
    zero = None if zero is None or not zero.numel() else zero.reshape(-1)
    y = product(flat, scale.reshape(-1), zero, weight, w_scale, w_sum, bias, counters, dtype, tiles)
    return y.view(*codes.shape[:-1], N)


def empty_product(
    rows_: torch.Size, N: int, bias: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:  # fmt: skip
    """The result over no rows, or no columns: the bias, or zeros."""
    y = torch.zeros(*rows_, N, dtype=dtype, device=device)
    return y if bias is None else y + bias.to(dtype)


def product(
    codes: Tensor, scale: Tensor, zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, counters: Tensor, dtype: torch.dtype, tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The product of codes [M, in] under one configuration."""
    zero = None if zero is None or not zero.numel() else zero
    if "SPLIT" in tiles:
        symmetric = zero is None
        return _decode(codes, scale, zero, weight, w_scale, w_sum, bias, counters, dtype, symmetric, True, tiles)
    if tiles["KERNEL"] == "torch":
        if zero is None and dtype == torch.bfloat16:
            return scaled_mm(codes, scale, weight, w_scale, bias)
        tiles = default(max(len(codes), MOST_DECODE_ROWS + 1), weight.shape[0], weight.shape[1], False)
    return _gemm(codes, scale, zero, weight, w_scale, w_sum, bias, dtype, tiles)


def scaled_mm(codes: Tensor, scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """``torch._scaled_mm`` with a scale for each row of both operands: float8 to bfloat16."""
    unplanned()
    return torch._scaled_mm(
        codes, weight.T, scale[:, None], w_scale[None, :], bias=bias, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _decode(
    x: Tensor, x_scale: Tensor | None, x_zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, counters: Tensor, dtype: torch.dtype, symmetric: bool, quantized: bool,
    tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    if M > MOST_DECODE_ROWS:
        raise ValueError(f"{M} rows; this kernel takes {MOST_DECODE_ROWS}")
    block_m = max(16, 1 << (M - 1).bit_length())
    block_n, block_k, split = tiles["BLOCK_N"], tiles["BLOCK_K"], tiles["SPLIT"]
    ones = 1 if M == 1 else block_m
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    float8 = weight.dtype == FLOAT8
    partial, blocks = y, -(-N // block_n)
    if split > 1:
        size = blocks * split * block_n * block_m
        partial = torch.empty(size, dtype=torch.float32 if float8 else torch.int32, device=x.device)
    constants = {
        "QUANTIZED": quantized, "STATIC": not quantized and x_scale is not None, "FLOAT8": float8,
        "ASYMMETRIC": not symmetric, "HAS_BIAS": bias is not None, "EPS": torch.finfo(dtype).eps,
        "EVEN": K % block_k == 0, "ROWS": ones, "GRID_BLOCK": max(16, min(4096, triton.next_power_of_2(K)) // ones),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split,
    }  # fmt: skip
    x_scale = w_scale if x_scale is None else x_scale
    x_zero = w_sum if x_zero is None else x_zero
    bias = w_scale if bias is None else bias
    args = (x, weight, w_scale, w_sum, bias, x_scale, x_zero, y, partial, counters, M, N, K)
    types = (x.dtype, dtype, bias.dtype, x_scale.dtype, x_zero.dtype)
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    key = (*constants.values(), warps, stages, N, K, types, aligned(x, weight, w_scale, bias, x_scale, x_zero))
    launch(decode_kernel, (blocks, split, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def _gemm(
    x: Tensor, x_scale: Tensor, x_zero: Tensor | None, weight: Tensor, w_scale: Tensor, w_sum: Tensor,
    bias: Tensor | None, dtype: torch.dtype, tiles: dict[str, Any],
) -> Tensor:  # fmt: skip
    (M, K), N = x.shape, weight.shape[0]
    y = torch.empty(M, N, dtype=dtype, device=x.device)
    tiles = readable(tiles, x, weight)
    persistent = tiles["KERNEL"] == "persistent"
    block = {name: tiles[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP")}
    count = -(-M // block["BLOCK_M"]) * -(-N // block["BLOCK_N"])
    constants: dict[str, Any] = {
        "FLOAT8": weight.dtype == FLOAT8, "ASYMMETRIC": x_zero is not None, "HAS_BIAS": bias is not None
    }  # fmt: skip
    if persistent:
        allow_descriptors()
        programs = processors(x.device)
        constants |= {"PROGRAMS": programs, "FLATTEN": bool(tiles["FLATTEN"]), "HALVES": bool(tiles["HALVES"])}
        count = min(count, programs)
    else:
        constants |= {"EVEN": K % block["BLOCK_K"] == 0}
    constants |= block
    x_zero = w_sum if x_zero is None else x_zero
    bias = w_scale if bias is None else bias
    args = (x, weight, w_scale, w_sum, bias, x_scale, x_zero, y, M, N, K)
    warps, stages = tiles["num_warps"], tiles["num_stages"]
    types = (x.dtype, dtype, bias.dtype, x_zero.dtype)
    key = (*constants.values(), warps, stages, N, K, types, aligned(x, weight, w_scale, bias, x_scale, x_zero))
    kernel: Any = persistent_kernel if persistent else grouped_kernel
    launch(kernel, (count, 1, 1), args, constants, num_warps=warps, num_stages=stages, key=key)
    return y


def readable(tiles: dict[str, Any], x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The configuration itself, or one without tensor descriptors where they cannot be read."""
    if tiles["KERNEL"] == "grouped" or reads_tiles(x, weight):
        return tiles
    large = tiles["BLOCK_M"] * tiles["BLOCK_N"] > 128 * 128
    return tiles | (WITHOUT_DESCRIPTORS if large else {"KERNEL": "grouped"})


def reads_tiles(x: Tensor, weight: Tensor) -> bool:
    """Whether tensor descriptors can read both operands: rows that begin at multiples of 16 bytes, and the hardware."""
    if x.shape[1] % 16 or not aligned(x, weight):
        return False
    return not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] >= 9


@functools.cache
def processors(device: torch.device) -> int:
    """The multiprocessors of a device; a few in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def allow_descriptors() -> None:
    """Let the next launch have memory for its tensor descriptors."""
    triton.set_allocator(_scratch)
    unplanned()


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, device="cuda", dtype=torch.int8)
