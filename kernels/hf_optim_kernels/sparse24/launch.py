"""From tensors to launches: which kernel of ``hf_optim::sparse24`` runs, and with which tiles, for a number of rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.dense import over_rows
from ..common.launch import is_aligned, is_interpreted, launch
from ..common.launch_plan import prevent_recording
from ..common.splitk import launch_split
from ..wna16 import wide as common
from . import cusparselt, mma_layout, naive, tensor_core_launch, tiles, wide
from .kernel import HALF, decompress_kernel, dot_kernel, row_kernel
from .naive import PackedTensors


def sparse24(x: Tensor, weight: PackedTensors, config: tiles.Config | None = None) -> Tensor:
    """Return ``x W^T + bias`` for ``x`` [..., in], with ``config`` instead of the chosen configuration."""
    return over_rows(x, naive.shape_of(weight.bits)[0], lambda flat: _product(_as_words(flat), weight, config))


def _as_words(x: Tensor) -> Tensor:
    """Return ``x``, or a copy of it that can be read as aligned words."""
    return x if x.is_contiguous() and is_aligned(x) else x.clone(memory_format=torch.contiguous_format)


def _product(x: Tensor, weight: PackedTensors, config: tiles.Config | None) -> Tensor:
    """Return the product of ``x`` [rows, in]."""
    if mma_layout.holds(weight.values):
        return _tiled(x, weight, config)
    (M, K), N = x.shape, weight.bits.shape[0]
    found = config or _chosen(M, N, K, weight, x)
    if found["path"] == "library":
        return cusparselt.product(x, weight.values, weight.bias, found["algorithm"])
    if found["path"] == "wide":
        if config is not None:  # who times configurations wants this one, or its error
            return wide.product(x, weight, config)
        y = common.attempt(lambda: wide.product(x, weight, found), x.device)
        return _product(x, weight, None) if y is None else y
    if found["path"] == "dense":
        prevent_recording()
        return torch.nn.functional.linear(x, decompress(weight, K, x.dtype), weight.bias)
    return _run(x, weight, found)


def _chosen(M: int, N: int, K: int, weight: PackedTensors, x: Tensor) -> tiles.Config:
    is_shared, is_wide = cusparselt.is_shared(weight.values, weight.bits), M > 32 and wide.supports(x, weight)
    choose = functools.partial(tiles.chosen, N, K, M, weight.width, x.dtype, x.device)
    found = choose(is_shared, is_wide)
    if found["path"] != "library":
        return found
    prevent_recording()  # what pays depends on whether a graph is being captured
    return found if cusparselt.pays(M, N, K) else choose(False, is_wide)


def _tiled(x: Tensor, weight: PackedTensors, config: tiles.Config | None) -> Tensor:
    """Return the product of ``x`` [rows, in] with codes in the order of sparse tensor cores."""
    (M, K), N = x.shape, naive.shape_of(weight.bits)[0]
    found = config or tensor_core_launch.chosen(N, K, M, x.dtype, x.device)
    if found["path"] == "dense" or is_interpreted(dot_kernel):
        prevent_recording()
        dense = tensor_core_launch.decompress(weight, x.dtype)
        return torch.nn.functional.linear(x, dense, weight.bias)
    return tensor_core_launch.sparse24(x, weight, found)


def _run(x: Tensor, weight: PackedTensors, config: tiles.Config) -> Tensor:
    """Return the product of ``x`` [rows, in] by the kernels for the layout of ``naive``."""
    values, bits, scale, zero, bias, semaphores, width, group_size, zero_offset = weight
    assert semaphores is not None
    (M, K), N = x.shape, bits.shape[0]
    kinds = (None if scale is None else scale.dtype, None if zero is None else zero.dtype, bias is not None)
    form = (tuple(config.values()), N, K, width, group_size, zero_offset, x.dtype, kinds)
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]), config["SPLIT"])
    if grid[2] > 1 and grid[0] * grid[1] > semaphores.numel():
        return _run(x, weight, {**config, "SPLIT": 1})
    tensors = (values, bits, *(bits if tensor is None else tensor for tensor in (scale, zero, bias)))
    kernel: Any = row_kernel if config["path"] == "row" else dot_kernel
    return launch_split(
        kernel, grid, (x, *tensors), (semaphores, M, N, K // 4, 2 * bits.shape[1]), (M, N), x.dtype,
        constants=_constants(*form), num_warps=config["num_warps"], num_stages=config["num_stages"],
        key=(*form, *map(is_aligned, tensors)),
    )  # fmt: skip


@functools.cache
def _constants(
    config: tuple, N: int, K: int, width: int, group_size: int, zero_offset: int, dtype: torch.dtype, kinds: tuple
) -> dict[str, Any]:
    """Return the constants of a kernel. ``kinds``: dtypes of scale and zero point, and whether there is a bias."""
    found = tiles.config(*config)
    constants = {
        "WIDTH": width,
        "SCALES": "none" if width == 16 else _scales(group_size, K, found["FOURS"]),
        "GROUP": max(1, min(group_size, K) // 4),
        "HAS_ZERO": kinds[1] is not None,
        "ZERO_OFFSET": zero_offset,
        "HAS_BIAS": kinds[2],
        "EVEN": K % (8 * HALF.value) == 0,
        **compute_constants(dtype, dot_kernel),
        "BLOCK_M": found["BLOCK_M"],
        "BLOCK_N": found["BLOCK_N"],
        "GROUPS24": found["FOURS"],
        "SPLIT": found["SPLIT"],
    }
    if found["path"] == "row":
        constants["STAGES"] = found["num_stages"]
    return constants


def _scales(group_size: int, columns: int, groups24: int) -> str:
    """Return where scales are applied: to a "row" at the end, to the sum of a "step" of 2:4 groups, or to "each"."""
    if group_size >= columns:
        return "row"
    return "step" if group_size % (4 * groups24) == 0 else "each"


def decompress(weight: PackedTensors, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the dense weight [out, in], of 16 bits: that of ``naive.dequantize``, rounded to ``dtype``."""
    values, bits, scale, zero, _, _, width, group_size, zero_offset = weight
    if mma_layout.holds(values):
        return tensor_core_launch.decompress(weight, dtype)
    N, block = bits.shape[0], 32
    out = torch.empty((N, columns), dtype=dtype, device=bits.device)
    constants = {
        "WIDTH": width,
        "GROUP": max(1, min(group_size, columns) // 4),
        "HAS_ZERO": zero is not None,
        "ZERO_OFFSET": zero_offset,
        **compute_constants(dtype, dot_kernel),
        "BLOCK_N": block,
    }
    scales, zeros = bits if scale is None else scale, bits if zero is None else zero
    key = (tuple(constants.values()), N, columns, dtype, scales.dtype, zeros.dtype)
    launch(
        decompress_kernel, (triton.cdiv(N, block), bits.shape[1] // HALF.value, 1),
        (values, bits, scales, zeros, out, N, columns // 4, 2 * bits.shape[1]), constants,
        num_warps=4, num_stages=1, key=(*key, *map(is_aligned, (values, bits, scales, zeros))),
    )  # fmt: skip
    return out
