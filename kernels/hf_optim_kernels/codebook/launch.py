"""From tensors to launches: which kernel runs, and with which tiles, for a number of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.compute_type import compute_constants
from ..common.dense import multiply_decoded, over_rows
from ..common.launch import is_aligned, launch
from ..common.splitk import launch_split, new_semaphores
from .kernel import _dense_kernel, _linear_kernel
from .lookup import MOST_BITS
from .naive import WORD, PackedTensors, rows_of

# With more rows, decoding the whole weight and the library's product are faster than the fused kernel.
MOST_ROWS = 32
_NAMES = ("BLOCK_M", "BLOCK_N", "SPLIT", "EDGE", "num_warps", "num_stages")
# A layer whose decoded weight is larger is decoded and multiplied in parts.
MOST_BYTES = 256 << 20


def default(M: int, N: int, K: int) -> dict[str, int]:
    """Return a guess at the fastest tiles; ``M`` is a bucket."""
    block_m, block_n = max(8, min(M, 64)), 64 if M <= 8 else 32
    tiles, wanted = -(-N // block_n) * -(-M // block_m), 1600
    split = next(s for s in (1, 2, 4, 8) if s == 8 or tiles * s >= wanted or 512 * s >= K)
    # Each stage holds the inputs of sixteen slices in shared memory.
    return dict(zip(_NAMES, (block_m, block_n, split, 64, 4, 2), strict=True))


def candidates(M: int, N: int, K: int) -> list[dict[str, int]]:
    """Return tiles worth timing, the likeliest first; ``M`` is a bucket."""
    block_m = max(8, min(M, 64))
    shapes = [(block_m, n, s, edge, w, st) for s in (2, 4, 8) for edge in (64, 128, 32)
              for n, w in ((64, 4), (64, 2), (32, 2), (128, 4), (128, 8)) for st in (3, 2)]  # fmt: skip
    found = [default(M, N, K)] + [dict(zip(_NAMES, shape, strict=True)) for shape in shapes]
    return [tiles for i, tiles in enumerate(found) if 256 * tiles["SPLIT"] <= K and tiles not in found[:i]]


def semaphores_for(N: int, device: torch.device) -> Tensor:
    """Return split-k semaphores for a weight of ``N`` rows; a launch leaves them zero."""
    return new_semaphores(4 * max(1, -(-N // 32)), device)


def tiles_for(M: int, N: int, K: int, bits: int, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Return the tuned tiles for ``M`` rows, else the default ones."""
    return tuning.choose(f"codebook{bits}", (N, K), M, dtype, device, lambda rows: default(rows, N, K))


def _math(dtype: torch.dtype, bits: int) -> dict[str, Any]:
    found = compute_constants(dtype, _linear_kernel)
    return found | {"ASM": found["ASM"] and bits <= MOST_BITS}


def fused(x: Tensor, weight: PackedTensors, tiles: dict[str, int] | None = None) -> Tensor:
    """Return ``x W^T + bias`` [M, out] by the fused kernel: ``x`` [M, in] with contiguous rows, M > 0."""
    *tensors, bias, semaphores = weight
    words, table, _, values, columns, _, _ = tensors
    assert semaphores is not None
    (M, K), (bits, _, N, size) = x.shape, words.shape
    tiles = tiles or tiles_for(M, N, K, bits, x.dtype, x.device)
    block_m, block_n, edge, warps, stages = (tiles[n] for n in _NAMES if n != "SPLIT")
    grid_n, grid_m = -(-N // block_n), -(-M // block_m)
    split = tiles["SPLIT"] if grid_n * grid_m <= semaphores.numel() else 1
    math = _math(x.dtype, bits)
    constants = {
        "SLICE": size, "BITS": bits, "HAS_BIAS": bias is not None, **math, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "SPLIT": split, "EDGE": edge,
    }  # fmt: skip
    before = (x, *tensors, bias if bias is not None else table)
    key = (
        x.dtype, table.dtype, values.dtype, columns.dtype, bias.dtype if bias is not None else 0, N, K, x.stride(0),
        bits, size, math["ASM"], split, block_m, block_n, edge, warps, stages,
        *(is_aligned(tensor) for tensor in before),
    )  # fmt: skip
    after = (semaphores, M, N, K, x.stride(0), words.stride(0), words.stride(1))
    return launch_split(
        _linear_kernel, (grid_n, grid_m, split), before, after, (M, N), x.dtype, constants=constants, num_warps=warps,
        num_stages=stages, key=key,
    )  # fmt: skip


def dense(
    weight: PackedTensors, width: int, dtype: torch.dtype, first: int = 0, count: int | None = None
) -> Tensor:  # fmt: skip
    """Return rows ``first : first + count`` of the weight in ``dtype``: [count, in]; ``width`` is ``in``."""
    words, table, registers, values, columns, _, starts, _, _ = weight
    bits, _, N, size = words.shape
    count = N - first if count is None else count
    out = torch.empty((count, width), dtype=dtype, device=words.device)
    if out.numel() == 0:
        return out
    block, math = 64, _math(dtype, bits)
    launch(
        _dense_kernel, (-(-width // (WORD * size)), -(-count // block), 1),
        (words, table, registers, out, first, count, width, words.stride(0), words.stride(1)),
        {"SLICE": size, "BITS": bits, **math, "BLOCK_N": block},
        num_warps=4, num_stages=1,
        key=(dtype, table.dtype, first, count, width, words.stride(0), words.stride(1), bits, size,
             is_aligned(words), is_aligned(out), is_aligned(table), is_aligned(registers)),
    )  # fmt: skip
    rows = rows_of(starts, len(values))
    if count < N:
        inside = (rows >= first) & (rows < first + count)
        rows, columns, values = rows[inside] - first, columns[inside], values[inside]
    return out.index_put_((rows, columns.long()), values.to(dtype))


def by_library(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``, ``x`` [M, in], by the library's product with the decoded weight, or part after part."""
    decode = lambda first, count: dense(weight, x.shape[1], x.dtype, first, count)  # noqa: E731
    return multiply_decoded(x, weight.words.shape[2], weight.bias, MOST_BYTES, decode)


def codebook_linear(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``, ``x`` [..., in]; ``weight.semaphores`` as ``semaphores_for`` makes them."""
    product = lambda flat: fused(flat, weight) if len(flat) <= MOST_ROWS else by_library(flat, weight)  # noqa: E731
    return over_rows(x, weight.words.shape[2], product)
