"""From tensors to launches: which kernel with which tiles for so many rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.launch_plan import Plan, aligned, interpreted, launch
from .decode import BF16, FP16, FP32
from .kernel import _dense_kernel, _linear_kernel
from .naive import plane, sharing

# With more rows, decoding the whole weight and the library's product are faster than the fused kernel (H200: 126
# microseconds against 133 for 512 rows of a 14336 x 4096 layer, 83 against 70 for 256).
MOST_ROWS = 256
_TILES_NAMES = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
# A layer whose decoded weight is larger is decoded and multiplied in parts.
MOST_BYTES = 256 << 20


def default(M: int, N: int, K: int, width: int) -> dict[str, int]:
    """A guess at the fastest tiles, from what was fast on an H200; ``M`` is a bucket."""
    wide = M >= 64 and N >= 8192
    block_m, block_n = max(8, min(M, 64)), 128 if wide else 64
    tiles, wanted = -(-N // block_n) * -(-M // block_m), 400 if M < 64 else 100 if wide else 256
    split = next(s for s in (1, 2, 4, 8) if s == 8 or tiles * s >= wanted or 1024 * s >= K)
    return dict(zip(_TILES_NAMES, (block_m, block_n, split, 8 if wide else 4, 3), strict=True))


def candidates(M: int, N: int, K: int, width: int) -> list[dict[str, int]]:
    """Tiles worth timing, the likeliest first; ``M`` is a bucket."""
    block_m = max(8, min(M, 64))
    if M <= 32:
        shapes = [(block_m, n, s, w, 3) for s in (4, 8, 2) for n, w in ((64, 4), (64, 2), (128, 4), (32, 1))]
    else:
        shapes = [(64, n, s, w, 3) for s in (1, 2, 4, 8) for n, w in ((64, 4), (128, 8))]
        shapes += [(128, 128, s, 8, 3) for s in (1, 2)] if M >= 128 else []
    found = [default(M, N, K, width)] + [dict(zip(_TILES_NAMES, shape, strict=True)) for shape in shapes]
    return [tiles for i, tiles in enumerate(found) if 256 * tiles["SPLIT"] <= K and tiles not in found[:i]]


def counters_for(N: int, device: torch.device) -> Tensor:
    """Zeros that count the finished programs of each tile; a launch leaves them zero."""
    return torch.zeros(max(1, -(-N // 64)) * 4, dtype=torch.int32, device=device)


def _math(dtype: torch.dtype) -> int:
    # The interpreter has no bfloat16 arithmetic: the same sums are made there in float32.
    if dtype == torch.bfloat16 and not interpreted(_linear_kernel):
        return BF16.value
    return FP16.value if dtype == torch.float16 else FP32.value


_TILES: dict[tuple, dict[str, int]] = {}


def tiles_for(M: int, N: int, K: int, width: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The tuned tiles for so many rows, else the default ones."""
    rows = tuning.bucket(M)
    key = (rows, N, K, width, dtype, device)
    if key not in _TILES:
        guess = default(rows, N, K, width)
        _TILES[key] = tuning.choose(f"w{width}a16", (N, K, rows), dtype, guess, device)
    return _TILES[key]


def fused(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    tiles: dict[str, int] | None = None,
) -> Tensor:
    """``x W^T + bias`` by the fused kernel: ``x`` [M, in] with contiguous rows, M > 0; the result is [M, out]."""
    M, N = x.shape[0], packed.shape[1]
    grid, before, after, options = _arguments(x, packed, scale, zero, bias, counters, width, group_size, tiles)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = out if grid[2] == 1 else torch.empty((grid[2], M, N), dtype=torch.float32, device=x.device)
    launch(_linear_kernel, grid, (x, *before, out, partial, *after), **options)
    return out


def plan_for(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
) -> Plan | None:
    """How the fused kernel runs inputs like ``x`` [..., in]; None where it is not what runs them."""
    K, N = x.shape[-1], packed.shape[1]
    if not x.is_contiguous() or not aligned(x, packed) or not 0 < x.numel() <= MOST_ROWS * K or N == 0:
        return None
    flat = x.view(-1, K)
    grid, before, after, options = _arguments(flat, packed, scale, zero, bias, counters, width, group_size, None)
    out = torch.empty((flat.shape[0], N), dtype=x.dtype, device=x.device)
    size = grid[2] * out.numel() if grid[2] > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x.device) if size else out
    compiled = launch(_linear_kernel, grid, (flat, *before, out, partial, *after), **options)
    if compiled is None:
        return None
    first = tuple(tensor.data_ptr() for tensor in before)
    return Plan(compiled, grid, first, (after[0].data_ptr(), *after[1:]), (*x.shape[:-1], N), x.dtype, x.device, size)


def _arguments(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
    tiles: dict[str, int] | None,
) -> tuple[tuple[int, int, int], tuple[Tensor, ...], tuple, dict[str, Any]]:
    """The grid, the arguments before the output and behind the partial sums, and what ``launch`` takes else."""
    M, K = x.shape
    N = packed.shape[1]
    chosen = tiles or tiles_for(M, N, K, width, x.dtype, x.device)
    block_m, block_n, warps, stages = (chosen[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    cells = -(-N // block_n) * -(-M // block_m)
    split = chosen["SPLIT"] if cells <= counters.numel() else 1
    grid = (-(-N // block_n), -(-M // block_m), split)
    has_zero, has_bias = zero is not None, bias is not None
    math, size, stride = _math(x.dtype), plane(group_size, K), x.stride(0)
    constants = {
        "PLANE": size, "GROUP": group_size, "SHARING": sharing(group_size, width, K),
        "HAS_ZERO": has_zero, "HAS_BIAS": has_bias, "WIDTH": width, "MATH": math, "ASM": _asm(math),
        "BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split,
    }  # fmt: skip
    key = (
        x.dtype, scale.dtype, zero.dtype if zero is not None else 0, bias.dtype if bias is not None else 0, N, K,
        stride, group_size, width, split, block_m, block_n, warps, stages, aligned(x, packed),
    )  # fmt: skip
    before = (packed, scale, zero if zero is not None else scale, bias if bias is not None else scale)
    options = {"constants": constants, "num_warps": warps, "num_stages": stages, "key": key}
    return grid, before, (counters, M, N, K, stride, packed.stride(0)), options


def _asm(math: int) -> bool:
    return math != FP32.value and not interpreted(_linear_kernel)


def dense(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    width: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
    first: int = 0,
    count: int | None = None,
) -> Tensor:
    """The weight in ``dtype``, rows ``first : first + count`` of it: [count, in]."""
    chunks, N = packed.shape[0], packed.shape[1]
    count = N - first if count is None else count
    out = torch.empty((count, columns), dtype=dtype, device=packed.device)
    if out.numel() == 0:
        return out
    size, block = plane(group_size, columns), 64
    # Scales lie [groups, out]: a slice of the rows begins further along each group.
    here = packed[:, first : first + count]
    scale, zero = scale[:, first : first + count], None if zero is None else zero[:, first : first + count]
    if count < N:
        scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    math, has_zero = _math(dtype), zero is not None
    launch(
        _dense_kernel, (chunks, -(-count // block), 1),
        (here, scale, zero if zero is not None else scale, out, count, columns, packed.stride(0)),
        {"PLANE": size, "GROUP": group_size,
         "SHARING": sharing(group_size, width, columns),
         "HAS_ZERO": has_zero, "WIDTH": width, "MATH": math, "ASM": _asm(math), "BLOCK_N": block},
        num_warps=4, num_stages=1,
        key=(dtype, scale.dtype, zero.dtype if zero is not None else 0, count, columns, N, group_size, width,
             aligned(here, scale, out)),
    )  # fmt: skip
    return out


def by_library(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bias: Tensor | None, width: int, group_size: int
) -> Tensor:
    """``x W^T + bias``, ``x`` [M, in], by the library's product with the decoded weight, or part after part."""
    N, K = packed.shape[1], x.shape[1]
    parts = -(-N * K * x.element_size() // MOST_BYTES)
    if parts <= 1:
        weight = dense(packed, scale, zero, width, group_size, K, x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
    rows = -(-N // parts // 128) * 128
    out = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    for first in range(0, N, rows):
        count = min(rows, N - first)
        weight = dense(packed, scale, zero, width, group_size, K, x.dtype, first, count)
        torch.mm(x, weight.T, out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)


def wna16(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bias: Tensor | None,
    counters: Tensor,
    width: int,
    group_size: int,
) -> Tensor:
    """``x W^T + bias``. Arguments as in ``naive.wna16``; ``counters`` as ``counters_for`` makes them."""
    K, N = x.shape[-1], packed.shape[1]
    flat = x.reshape(-1, K)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    M = flat.shape[0]
    if M == 0 or N == 0:
        return x.new_empty((*x.shape[:-1], N))
    if M <= MOST_ROWS:
        y = fused(flat, packed, scale, zero, bias, counters, width, group_size)
    else:
        y = by_library(flat, packed, scale, zero, bias, width, group_size)
    return y.view(*x.shape[:-1], N)
