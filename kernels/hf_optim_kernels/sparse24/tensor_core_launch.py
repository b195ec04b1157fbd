"""Running ``hf_optim::sparse24`` for codes in the order of sparse tensor cores (``fragments``): tiles and launches."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch_plan import Plan, aligned, interpreted, launch
from . import mma_layout, naive, tiles
from .tensor_cores import IN_ORDER, IN_PIECES, IN_WORDS, stage_kernel, step, step_registers, tiles_kernel, unpack_kernel
from .triton_helpers import BF16, FP16

HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}


def sparse24(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, counters: Tensor,
    group_size: int, middle: int, config: tiles.Config,
) -> Tensor:  # fmt: skip
    """``x W^T + bias`` for contiguous, aligned ``x`` [rows, in]; other arguments as in ``op.sparse24``."""
    M, N = x.shape[0], naive.shape_of(bits)[0]
    grid, before, after, options = _arguments(
        x, values, bits, scale, zero, bias, counters, group_size, middle, config
    )  # fmt: skip
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = out if grid[2] == 1 else torch.empty((grid[2], M, N), dtype=torch.float32, device=x.device)
    inputs = staged(x, options["constants"]["BLOCKS"]) if options["constants"]["INPUTS"] == IN_ORDER.value else x
    launch(tiles_kernel, grid, (inputs, *before, out, partial, *after), **options)
    return out


def plan_for(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, counters: Tensor,
    group_size: int, middle: int,
) -> Plan | None:  # fmt: skip
    """How one launch runs inputs like ``x`` [..., in]; None where it takes another way, or two launches."""
    K, N = x.shape[-1], naive.shape_of(bits)[0]
    if not x.is_contiguous() or not aligned(x) or not x.numel() or N == 0 or interpreted(tiles_kernel):
        return None
    flat = x.view(-1, K)
    config = chosen(N, K, flat.shape[0], x.dtype, x.device)
    if config["path"] != "tiles" or config["algorithm"] == IN_ORDER.value:
        return None
    grid, before, after, options = _arguments(
        flat, values, bits, scale, zero, bias, counters, group_size, middle, config
    )  # fmt: skip
    out = torch.empty((flat.shape[0], N), dtype=x.dtype, device=x.device)
    size = grid[2] * out.numel() if grid[2] > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x.device) if size else out
    compiled = launch(tiles_kernel, grid, (flat, *before, out, partial, *after), **options)
    if compiled is None:
        return None
    first = tuple(tensor.data_ptr() for tensor in before)
    return Plan(compiled, grid, first, (after[0].data_ptr(), *after[1:]), (*x.shape[:-1], N), x.dtype, x.device, size)


def _arguments(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, counters: Tensor,
    group_size: int, middle: int, config: tiles.Config,
) -> tuple[tuple[int, int, int], tuple[Tensor, ...], tuple, dict[str, Any]]:  # fmt: skip
    """The grid, the arguments before the output and behind the partial sums, and what ``launch`` takes else."""
    (M, K), N = x.shape, naive.shape_of(bits)[0]
    kinds = (scale.dtype, None if zero is None else zero.dtype, None if bias is None else bias.dtype)
    constants = _constants(tuple(config.values()), N, K, group_size, middle, x.dtype, kinds)
    split = constants["SPLIT"]
    grid = (triton.cdiv(M, 8 * constants["BLOCKS"]), N // mma_layout.ROWS // constants["TILES"], split)
    if split > 1 and grid[0] * grid[1] > counters.numel():
        return _arguments(
            x, values, bits, scale, zero, bias, counters, group_size, middle, {**config, "SPLIT": 1}
        )  # fmt: skip
    before = (values, bits, scale, bits if zero is None else zero, bits if bias is None else bias)
    key = (tuple(config.values()), N, K, group_size, middle, x.dtype, kinds, *map(aligned, before))
    options = {"constants": constants, "num_warps": config["num_warps"], "num_stages": 1, "key": key}
    return grid, before, (counters, M, N, K // mma_layout.COLUMNS), options


def staged(x: Tensor, blocks: int) -> Tensor:
    """``x`` [rows, in] in the order of lanes, ``blocks`` times eight rows at a time: [rows / 8, in / 128, 1024]."""
    M, units = x.shape[0], x.shape[1] // mma_layout.COLUMNS
    count = triton.cdiv(M, 8 * blocks) * blocks
    out = torch.empty((count, units, 8 * mma_layout.COLUMNS), dtype=x.dtype, device=x.device)
    key = (x.dtype, units)
    launch(stage_kernel, (units, count, 1), (x, out, M, units), {}, num_warps=4, num_stages=1, key=key)
    return out


@functools.cache
def _constants(
    config: tuple, N: int, K: int, group_size: int, middle: int, dtype: torch.dtype, kinds: tuple
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
        "MIDDLE": middle,
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


def decompress(
    values: Tensor, bits: Tensor, scale: Tensor, zero: Tensor | None, group_size: int, middle: int, dtype: torch.dtype
) -> Tensor:
    """The dense weight [out, in], of 16 bits: that of ``naive.dequantize``, rounded to ``dtype``."""
    N, K = naive.shape_of(bits)
    out = torch.empty((N, K), dtype=dtype, device=bits.device)
    constants = {
        "GROUP": min(group_size, K),
        "HAS_ZERO": zero is not None,
        "MIDDLE": middle,
        "HALF": triton.language.bfloat16 if dtype == torch.bfloat16 else triton.language.float16,
    }
    zeros = bits if zero is None else zero
    key = (group_size, zero is not None, middle, dtype, scale.dtype, zeros.dtype, N % 16, K)
    launch(
        unpack_kernel, (N // mma_layout.ROWS, K // mma_layout.COLUMNS, 1),
        (values, bits, scale, zeros, out, N, K // mma_layout.COLUMNS), constants,
        num_warps=4, num_stages=1, key=(*key, *map(aligned, (values, bits, scale, zeros))),
    )  # fmt: skip
    return out


@functools.cache
def _choose(N: int, K: int, rows: int, dtype: torch.dtype, device: torch.device) -> tiles.Config:
    return tuning.choose("sparse24-tiles", (N, K, rows), dtype, tiles.default_tiles(N, K, rows), device)


def chosen(N: int, K: int, M: int, dtype: torch.dtype, device: torch.device) -> tiles.Config:
    """The configuration for M rows, the tuned one where there is one."""
    return _choose(N, K, tuning.bucket(M), dtype, device)


def forget() -> None:
    """Look tables up again."""
    _choose.cache_clear()
