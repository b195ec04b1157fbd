"""Running ``hf_optim::sparse24`` on a CUDA device (or interpreted): which kernel, and its launch."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch_plan import aligned, interpreted, launch
from . import cusparselt, mma_layout, naive, tensor_core_launch, tiles
from .kernel import HALF, decompress_kernel, dot_kernel, row_kernel
from .triton_helpers import BF16, FP16, FP32

DTYPES = (torch.bfloat16, torch.float16)


class Plan(NamedTuple):
    """All of a launch but its tensors and the number of rows."""

    kernel: Any
    config: tiles.Config
    constants: dict[str, Any]
    key: tuple


def sparse24(
    x: Tensor,
    values: Tensor,
    bits: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    middle: int,
    config: tiles.Config | None = None,
) -> Tensor:
    """``x W^T + bias``; arguments as in ``op.sparse24``, ``config`` instead of the chosen one."""
    K, N = x.shape[-1], naive.shape_of(bits)[0]
    flat = x.reshape(-1, K)
    if not flat.is_contiguous() or not aligned(flat):
        flat = flat.clone(memory_format=torch.contiguous_format)
    M = flat.shape[0]
    if M == 0 or N == 0:
        return x.new_empty(*x.shape[:-1], N)
    if mma_layout.holds(values):
        y = _tiled(flat, values, bits, scale, zero, bias, counters, group_size, middle, config)
        return y.view(*x.shape[:-1], N)
    shared = cusparselt.shared(values, bits)
    found = config or _choose(N, K, tuning.bucket(M), width, x.dtype, shared, x.device)
    if config is None and found["path"] == "library" and not cusparselt.pays(M, N, K):
        found = tiles.default(N, K, tuning.bucket(M), False)
    if found["path"] == "library":
        y = cusparselt.product(flat, values, bias, found["algorithm"])
    elif found["path"] == "dense":
        weight = decompress(values, bits, scale, zero, width, group_size, middle, K, x.dtype)
        y = torch.nn.functional.linear(flat, weight, bias)
    else:
        y = _run(flat, values, bits, scale, zero, bias, counters, width, group_size, middle, found)
    return y.view(*x.shape[:-1], N)


_choose = functools.cache(tiles.chosen)


def _tiled(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    counters: Tensor, group_size: int, middle: int, config: tiles.Config | None,
) -> Tensor:  # fmt: skip
    """``x`` [rows, in] with codes in the order of sparse tensor cores."""
    assert scale is not None
    (M, K), N = x.shape, naive.shape_of(bits)[0]
    found = config or tensor_core_launch.chosen(N, K, M, x.dtype, x.device)
    if found["path"] == "dense" or interpreted(dot_kernel):
        weight = tensor_core_launch.decompress(values, bits, scale, zero, group_size, middle, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    return tensor_core_launch.sparse24(x, values, bits, scale, zero, bias, counters, group_size, middle, found)


def _run(
    x: Tensor, values: Tensor, bits: Tensor, scale: Tensor | None, zero: Tensor | None, bias: Tensor | None,
    counters: Tensor, width: int, group_size: int, middle: int, config: tiles.Config,
) -> Tensor:  # fmt: skip
    (M, K), N = x.shape, bits.shape[0]
    kinds = (None if scale is None else scale.dtype, None if zero is None else zero.dtype, bias is not None)
    plan = _plan(tuple(config.values()), N, K, width, group_size, middle, x.dtype, kinds)
    split = plan.constants["SPLIT"]
    grid = (triton.cdiv(M, config["BLOCK_M"]), triton.cdiv(N, config["BLOCK_N"]), split)
    if split > 1 and grid[0] * grid[1] > counters.numel():
        return _run(
            x, values, bits, scale, zero, bias, counters, width, group_size, middle, {**config, "SPLIT": 1}
        )  # fmt: skip
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = out if split == 1 else torch.empty((split, M, N), dtype=torch.float32, device=x.device)
    tensors = (x, values, bits, bits if scale is None else scale, bits if zero is None else zero,
               out if bias is None else bias, out, partial, counters)  # fmt: skip
    key = plan.key if aligned(values, bits) else (*plan.key, "unaligned")
    launch(
        plan.kernel, grid, (*tensors, M, N, K // 4, 2 * bits.shape[1]), plan.constants,
        num_warps=config["num_warps"], num_stages=config["num_stages"], key=(*key, *map(aligned, tensors[3:6])),
    )  # fmt: skip
    return out


@functools.cache
def _plan(
    config: tuple, N: int, K: int, width: int, group_size: int, middle: int, dtype: torch.dtype, kinds: tuple
) -> Plan:
    """What depends on the weight and the configuration alone. ``kinds``: dtypes of scale and zero point, a bias?"""
    found = tiles.config(*config)
    constants = {
        "WIDTH": width,
        "SCALES": "none" if width == 16 else _scales(group_size, K, found["FOURS"]),
        "GROUP": max(1, min(group_size, K) // 4),
        "HAS_ZERO": kinds[1] is not None,
        "MIDDLE": middle,
        "HAS_BIAS": kinds[2],
        "EVEN": K % (8 * HALF.value) == 0,
        **math_of(dtype),
        "BLOCK_M": found["BLOCK_M"],
        "BLOCK_N": found["BLOCK_N"],
        "FOURS": found["FOURS"],
        "SPLIT": found["SPLIT"],
    }
    kernel = row_kernel if found["path"] == "row" else dot_kernel
    if found["path"] == "row":
        constants["STAGES"] = found["num_stages"]
    return Plan(kernel, found, constants, (config, N, K, width, group_size, middle, dtype, kinds))


def _scales(group_size: int, columns: int, fours: int) -> str:
    """Where scales are applied: to each "row" at the end, to the sum of a "step" of fours, or to "each" number."""
    if group_size >= columns:
        return "row"
    return "step" if group_size % (4 * fours) == 0 else "each"


def math_of(dtype: torch.dtype) -> dict[str, Any]:
    """The constants that say in which type a kernel computes, and whether with assembly."""
    plain = interpreted(dot_kernel)
    if dtype == torch.bfloat16:
        return {"MATH": FP32.value if plain else BF16.value, "ASM": not plain}
    return {"MATH": FP16.value, "ASM": not plain}


def decompress(
    values: Tensor, bits: Tensor, scale: Tensor | None, zero: Tensor | None, width: int, group_size: int, middle: int,
    columns: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The dense weight [out, in], of 16 bits: that of ``naive.dequantize``, rounded to ``dtype``."""
    if mma_layout.holds(values):
        assert scale is not None
        return tensor_core_launch.decompress(values, bits, scale, zero, group_size, middle, dtype)
    N, block = bits.shape[0], 32
    out = torch.empty((N, columns), dtype=dtype, device=bits.device)
    constants = {
        "WIDTH": width,
        "GROUP": max(1, min(group_size, columns) // 4),
        "HAS_ZERO": zero is not None,
        "MIDDLE": middle,
        **math_of(dtype),
        "BLOCK_N": block,
    }
    scales, zeros = bits if scale is None else scale, bits if zero is None else zero
    key = (tuple(constants.values()), N, columns, dtype, scales.dtype, zeros.dtype)
    launch(
        decompress_kernel, (triton.cdiv(N, block), bits.shape[1] // HALF.value, 1),
        (values, bits, scales, zeros, out, N, columns // 4, 2 * bits.shape[1]), constants,
        num_warps=4, num_stages=1, key=(*key, *map(aligned, (values, bits, scales, zeros))),
    )  # fmt: skip
    return out
