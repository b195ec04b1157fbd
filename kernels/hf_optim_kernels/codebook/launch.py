"""From tensors to launches: which kernel with which tiles for so many rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.launch_plan import Plan, aligned, interpreted, launch
from .kernel import _dense_kernel, _linear_kernel
from .lookup import BF16, FP16, FP32, MOST_BITS
from .naive import WORD, rows_of

# With more rows, decoding the whole weight and the library's product are faster than the fused kernel.
MOST_ROWS = 32
_NAMES = ("BLOCK_M", "BLOCK_N", "SPLIT", "EDGE", "num_warps", "num_stages")
# A layer whose decoded weight is larger is decoded and multiplied in parts.
MOST_BYTES = 256 << 20


def default(M: int, N: int, K: int) -> dict[str, int]:
    """A guess at the fastest tiles; ``M`` is a bucket."""
    block_m, block_n = max(8, min(M, 64)), 64 if M <= 8 else 32
    tiles, wanted = -(-N // block_n) * -(-M // block_m), 1600
    split = next(s for s in (1, 2, 4, 8) if s == 8 or tiles * s >= wanted or 512 * s >= K)
    # The inputs of sixteen planes wait in shared memory for each stage.
    return dict(zip(_NAMES, (block_m, block_n, split, 64, 4, 2), strict=True))


def candidates(M: int, N: int, K: int) -> list[dict[str, int]]:
    """Tiles worth timing, the likeliest first; ``M`` is a bucket."""
    block_m = max(8, min(M, 64))
    shapes = [(block_m, n, s, edge, w, st) for s in (2, 4, 8) for edge in (64, 128, 32)
              for n, w in ((64, 4), (64, 2), (32, 2), (128, 4), (128, 8)) for st in (3, 2)]  # fmt: skip
    found = [default(M, N, K)] + [dict(zip(_NAMES, shape, strict=True)) for shape in shapes]
    return [tiles for i, tiles in enumerate(found) if 256 * tiles["SPLIT"] <= K and tiles not in found[:i]]


def counters_for(N: int, device: torch.device) -> Tensor:
    """Zeros that count the finished programs of each tile; a launch leaves them zero."""
    return torch.zeros(max(1, -(-N // 32)) * 4, dtype=torch.int32, device=device)


def _math(dtype: torch.dtype) -> int:
    # The interpreter has no bfloat16 arithmetic: the same sums are made there in float32.
    if dtype == torch.bfloat16 and not interpreted(_linear_kernel):
        return BF16.value
    return FP16.value if dtype == torch.float16 else FP32.value


def _asm(math: int, bits: int) -> bool:
    return math != FP32.value and bits <= MOST_BITS and not interpreted(_linear_kernel)


_TILES: dict[tuple, dict[str, int]] = {}


def tiles_for(M: int, N: int, K: int, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """The tuned tiles for so many rows, else the default ones."""
    rows = tuning.bucket(M)
    key = (rows, N, K, bits, dtype, device)
    if key not in _TILES:
        _TILES[key] = tuning.choose(f"codebook{bits}", (N, K, rows), dtype, default(rows, N, K), device)
    return _TILES[key]


def fused(x: Tensor, held: tuple, bias: Tensor | None, counters: Tensor, tiles: dict[str, int] | None = None) -> Tensor:
    """``x W^T + bias`` by the fused kernel: ``x`` [M, in] with contiguous rows, M > 0; the result is [M, out].

    ``held`` are the tensors of the weight as ``op.codebook_linear`` names them, from ``words`` to ``starts``.
    """
    M, N = x.shape[0], held[0].shape[2]
    grid, before, after, options = _arguments(x, held, bias, counters, tiles)
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    partial = out if grid[2] == 1 else torch.empty((grid[2], M, N), dtype=torch.float32, device=x.device)
    launch(_linear_kernel, grid, (x, *before, out, partial, *after), **options)
    return out


def plan_for(x: Tensor, held: tuple, bias: Tensor | None, counters: Tensor) -> Plan | None:
    """How the fused kernel runs inputs like ``x`` [..., in]; None where it is not what runs them."""
    K, N = x.shape[-1], held[0].shape[2]
    if not x.is_contiguous() or not aligned(x, held[0]) or not 0 < x.numel() <= MOST_ROWS * K or N == 0:
        return None
    flat = x.view(-1, K)
    grid, before, after, options = _arguments(flat, held, bias, counters, None)
    out = torch.empty((flat.shape[0], N), dtype=x.dtype, device=x.device)
    size = grid[2] * out.numel() if grid[2] > 1 else 0
    partial = torch.empty(size, dtype=torch.float32, device=x.device) if size else out
    compiled = launch(_linear_kernel, grid, (flat, *before, out, partial, *after), **options)
    if compiled is None:
        return None
    first = tuple(tensor.data_ptr() for tensor in before)
    return Plan(compiled, grid, first, (after[0].data_ptr(), *after[1:]), (*x.shape[:-1], N), x.dtype, x.device, size)


def _arguments(
    x: Tensor, held: tuple, bias: Tensor | None, counters: Tensor, tiles: dict[str, int] | None
) -> tuple[tuple[int, int, int], tuple[Tensor, ...], tuple, dict[str, Any]]:  # fmt: skip
    """The grid, the arguments before the output and behind the partial sums, and what ``launch`` takes else."""
    words, table, registers, values, columns, owners, starts = held
    M, K = x.shape
    bits, _, N, size = words.shape
    chosen = tiles or tiles_for(M, N, K, bits, x.dtype, x.device)
    block_m, block_n, warps, stages = (chosen[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    cells = -(-N // block_n) * -(-M // block_m)
    split = chosen["SPLIT"] if cells <= counters.numel() else 1
    grid, math = (-(-N // block_n), -(-M // block_m), split), _math(x.dtype)
    asm = _asm(math, bits)
    constants = {
        "PLANE": size, "BITS": bits, "HAS_BIAS": bias is not None, "MATH": math, "ASM": asm, "BLOCK_M": block_m,
        "BLOCK_N": block_n, "SPLIT": split, "EDGE": chosen["EDGE"],
    }  # fmt: skip
    before = (words, table, registers, values, columns, owners, starts, bias if bias is not None else table)
    key = (
        x.dtype, table.dtype, values.dtype, columns.dtype, bias.dtype if bias is not None else 0, N, K, x.stride(0),
        bits, size, asm, split, block_m, block_n, chosen["EDGE"], warps, stages,
        *(aligned(tensor) for tensor in (x, *before)),
    )  # fmt: skip
    options = {"constants": constants, "num_warps": warps, "num_stages": stages, "key": key}
    return grid, before, (counters, M, N, K, x.stride(0), words.stride(0), words.stride(1)), options


def dense(held: tuple, width: int, dtype: torch.dtype, first: int = 0, count: int | None = None) -> Tensor:
    """The weight in ``dtype``, rows ``first : first + count`` of it: [count, in]; ``width`` is ``in``."""
    words, table, registers, values, columns, _, starts = held
    bits, _, N, size = words.shape
    count = N - first if count is None else count
    out = torch.empty((count, width), dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    block, math = 64, _math(dtype)
    asm = _asm(math, bits)
    launch(
        _dense_kernel, (-(-width // (WORD * size)), -(-count // block), 1),
        (words, table, registers, out, first, count, width, words.stride(0), words.stride(1)),
        {"PLANE": size, "BITS": bits, "MATH": math, "ASM": asm, "BLOCK_N": block},
        num_warps=4, num_stages=1,
        key=(dtype, table.dtype, first, count, width, words.stride(0), words.stride(1), bits, size,
             aligned(words), aligned(out), aligned(table), aligned(registers)),
    )  # fmt: skip
    rows = rows_of(starts, len(values))
    if count < N:
        inside = (rows >= first) & (rows < first + count)
        rows, columns, values = rows[inside] - first, columns[inside], values[inside]
    return out.index_put_((rows, columns.long()), values.to(dtype))


def by_library(x: Tensor, held: tuple, bias: Tensor | None) -> Tensor:
    """``x W^T + bias``, ``x`` [M, in], by the library's product with the decoded weight, or part after part."""
    N, K = held[0].shape[2], x.shape[1]
    parts = -(-N * K * x.element_size() // MOST_BYTES)
    if parts <= 1:
        return torch.nn.functional.linear(x, dense(held, K, x.dtype), bias)
    rows = -(-N // parts // 128) * 128
    out = torch.empty((x.shape[0], N), dtype=x.dtype, device=x.device)
    for first in range(0, N, rows):
        count = min(rows, N - first)
        torch.mm(x, dense(held, K, x.dtype, first, count).T, out=out[:, first : first + count])
    return out if bias is None else out.add_(bias)


def codebook_linear(x: Tensor, held: tuple, bias: Tensor | None, counters: Tensor) -> Tensor:
    """``x W^T + bias``, ``x`` [..., in]. Arguments as of ``fused``."""
    K, N = x.shape[-1], held[0].shape[2]
    flat = x.reshape(-1, K)
    if flat.stride(-1) != 1:
        flat = flat.contiguous()
    M = flat.shape[0]
    if M == 0 or N == 0:
        return x.new_empty((*x.shape[:-1], N))
    y = fused(flat, held, bias, counters) if M <= MOST_ROWS else by_library(flat, held, bias)
    return y.view(*x.shape[:-1], N)
