"""Launches of ``hf_optim::sparse24`` for codes in the order of sparse tensor cores (``mma_layout``)."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.compute_type import BF16, FP16
from ..common.launch import is_aligned, launch
from ..common.splitk import launch_split
from . import mma_layout, naive, tiles
from .naive import PackedTensors
from .tensor_cores import IN_ORDER, IN_PIECES, IN_WORDS, stage_kernel, step, step_registers, tiles_kernel, unpack_kernel

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def sparse24(x: Tensor, weight: PackedTensors, config: tiles.Config) -> Tensor:
    """Return ``x W^T + bias`` for contiguous, aligned ``x`` [rows, in]."""
    values, bits, scale, zero, bias, semaphores, _, group_size, zero_offset = weight
    assert scale is not None
    assert semaphores is not None
    (M, K), N = x.shape, naive.shape_of(bits)[0]
    kinds = (scale.dtype, None if zero is None else zero.dtype, None if bias is None else bias.dtype)
    form = (tuple(config.values()), N, K, group_size, zero_offset, x.dtype, kinds)
    constants = _constants(*form)
    split = constants["SPLIT"]
    grid = (triton.cdiv(M, 8 * constants["BLOCKS"]), N // mma_layout.ROWS // constants["TILES"], split)
    if split > 1 and grid[0] * grid[1] > semaphores.numel():
        return sparse24(x, weight, {**config, "SPLIT": 1})
    tensors = (values, bits, scale, bits if zero is None else zero, bits if bias is None else bias)
    inputs = staged(x, constants["BLOCKS"]) if constants["INPUTS"] == IN_ORDER.value else x
    return launch_split(
        tiles_kernel, grid, (inputs, *tensors), (semaphores, M, N, K // mma_layout.COLUMNS), (M, N), x.dtype,
        constants=constants, num_warps=config["num_warps"], num_stages=1, key=(*form, *map(is_aligned, tensors)),
    )  # fmt: skip


def staged(x: Tensor, blocks: int) -> Tensor:
    """Return ``x`` [rows, in] in the order of lanes, by ``blocks`` times eight rows: [rows / 8, in / 128, 1024]."""
    M, units = x.shape[0], x.shape[1] // mma_layout.COLUMNS
    count = triton.cdiv(M, 8 * blocks) * blocks
    out = torch.empty((count, units, 8 * mma_layout.COLUMNS), dtype=x.dtype, device=x.device)
    key = (x.dtype, units)
    launch(stage_kernel, (units, count, 1), (x, out, M, units), {}, num_warps=4, num_stages=1, key=key)
    return out


@functools.cache
def _constants(
    config: tuple, N: int, K: int, group_size: int, zero_offset: int, dtype: torch.dtype, kinds: tuple
) -> dict[str, Any]:
    found, units = tiles.config(*config), K // mma_layout.COLUMNS
    blocks, row_tiles = found["BLOCK_M"] // 8, found["BLOCK_N"] // mma_layout.ROWS
    warps, split = found["num_warps"], found["SPLIT"]
    taken = -(-units // (split * warps))
    depth = min(found["FOURS"] * 4 // mma_layout.COLUMNS, taken)
    guard = units % (split * warps * depth) != 0
    return {
        "SCALES": "row" if group_size >= K else "group",
        "GROUP": min(group_size, K),
        "HAS_ZERO": kinds[1] is not None,
        "ZERO_OFFSET": zero_offset,
        "HAS_BIAS": kinds[2] is not None,
        "GUARD": guard,
        "MATH": BF16.value if dtype == torch.bfloat16 else FP16.value,
        "TRIPS": -(-taken // depth),
        "TILES": row_tiles if N // mma_layout.ROWS % row_tiles == 0 else 1,
        "BLOCKS": blocks,
        "DEPTH": depth,
        "SPLIT": split,
        "WARPS": warps,
        "INPUTS": IN_WORDS.value if guard and found["algorithm"] == IN_PIECES.value else found["algorithm"],
        "EVEN_STEP": step(blocks, HALVES[dtype], 0),
        "ODD_STEP": step(blocks, HALVES[dtype], 1),
        "REGISTERS": step_registers(blocks),
    }


def decompress(weight: PackedTensors, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [out, in], of 16 bits: that of ``naive.dequantize``, rounded to ``dtype``."""
    values, bits, scale, zero, _, _, _, group_size, zero_offset = weight
    assert scale is not None
    N, K = naive.shape_of(bits)
    out = torch.empty((N, K), dtype=dtype, device=bits.device)
    constants = {
        "GROUP": min(group_size, K),
        "HAS_ZERO": zero is not None,
        "ZERO_OFFSET": zero_offset,
        "HALF": triton.language.bfloat16 if dtype == torch.bfloat16 else triton.language.float16,
    }
    zeros = bits if zero is None else zero
    key = (group_size, zero is not None, zero_offset, dtype, scale.dtype, zeros.dtype, N % 16, K)
    launch(
        unpack_kernel, (N // mma_layout.ROWS, K // mma_layout.COLUMNS, 1),
        (values, bits, scale, zeros, out, N, K // mma_layout.COLUMNS), constants,
        num_warps=4, num_stages=1, key=(*key, *map(is_aligned, (values, bits, scale, zeros))),
    )  # fmt: skip
    return out


def chosen(N: int, K: int, M: int, dtype: torch.dtype, device: torch.device) -> tiles.Config:
    """Return the configuration for ``M`` rows."""
    return tuning.choose("sparse24-tiles", (N, K), M, dtype, device, lambda rows: tiles.default_tiles(N, K, rows))
