"""From tensors to launches: which kernel runs, and with which tiles, for a number of rows."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ..common import tuning
from ..common.compute_type import compute_constants
from ..common.dense import multiply_decoded, over_rows
from ..common.launch import is_aligned, launch
from ..common.splitk import launch_split, new_semaphores
from . import float4, specialized, wide
from .float4_kernel import _float_dense_kernel, _float_linear_kernel
from .kernel import _dense_kernel, _linear_kernel
from .naive import PackedTensors, slice_columns, slices_per_scale

# With more rows, decoding the whole weight and the library's product are faster than the fused kernel (H200: 126
# microseconds against 133 for 512 rows of a 14336 x 4096 layer, 83 against 70 for 256).
MOST_ROWS = 256
# Numbers of 4-bit floats take more instructions, in every tile again (43 microseconds against 27 for 256 rows of a
# 4608 x 3584 layer, which takes int4 as long decoded).
MOST_FLOAT_ROWS = 128
_TILE_NAMES = ("KERNEL", "BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
LIBRARY = dict(zip(_TILE_NAMES, ("library", 0, 0, 1, 0, 0), strict=True))
# With fewer, the fused kernel is faster.
LEAST_WIDE_ROWS = 32
# Kernels that are written for Hopper's warp groups, by name.
WARP_GROUPS = {"wide": wide, "specialized": specialized}
# The names of the products with 4-bit floats, in tables of tiles.
NAMES = {float4.NVFP4: "nvfp4", float4.MXFP4: "mxfp4"}
# A layer whose decoded weight is larger is decoded and multiplied in parts.
MOST_BYTES = 256 << 20


def default(M: int, N: int, K: int, format: int = 0) -> dict[str, Any]:
    """Return a guess at the fastest tiles, from what was fast on an H200; ``M`` is a bucket."""
    if (MOST_FLOAT_ROWS if format else MOST_ROWS) < M:
        return dict(LIBRARY)
    wide = M >= 64 and N >= 8192
    block_m, block_n = max(8, min(M, 64)), 128 if wide else 64
    tiles, wanted = -(-N // block_n) * -(-M // block_m), 400 if M < 64 else 100 if wide else 256
    split = next(s for s in (1, 2, 4, 8) if s == 8 or tiles * s >= wanted or 1024 * s >= K)
    return dict(zip(_TILE_NAMES, ("fused", block_m, block_n, split, 8 if wide else 4, 3), strict=True))


def candidates(M: int, N: int, K: int, width: int, format: int = 0) -> list[dict[str, Any]]:
    """Return tiles worth timing, the likeliest first; ``M`` is a bucket."""
    block_m = max(8, min(M, 64))
    shapes: list[tuple[Any, ...]] = []
    if M <= 32:
        shapes = [
            ("fused", block_m, n, s, w, 3) for s in (4, 8, 2, 1) for n, w in ((64, 4), (64, 2), (128, 4), (32, 1))
        ]
    elif M <= 256:
        shapes = [("fused", 64, n, s, w, 3) for s in (1, 2, 4, 8) for n, w in ((64, 4), (128, 8))]
    ring = 3 if width == 4 else 2
    if M >= 64:
        # Rows, columns, and slices of inputs on their way, as many as shared memory holds.
        rings = ((256, 128, 4), (256, 128, 5), (128, 256, 5), (128, 128, 6), (64, 128, 8), (64, 256, 6))
        shapes += [
            ("specialized", m, n, s, 4, r) for m, n, r in rings for s in (1, 2, 3, 4, 6, 8)
            if min(M, 128) <= m < 2 * M and (s == 1 or 90 < -(-N // n) * -(-M // m) * s <= 400)
        ]  # fmt: skip
        kinds = ((64, 128, 8, ring), (128, 128, 8, ring), (256, 128, 8, ring), (128, 256, 8, ring), (64, 128, 4, ring))
        shapes += [
            ("wide", m, n, s, w, r) for m, n, w, r in kinds for s in (1, 2, 3, 4, 6, 8)
            if m < 2 * M and (s == 1 or 90 < -(-N // n) * -(-M // m) * s <= 400)
        ]  # fmt: skip
    found = [default(M, N, K, format)] + [dict(zip(_TILE_NAMES, shape, strict=True)) for shape in shapes]
    found = [tiles for i, tiles in enumerate(found) if 256 * tiles["SPLIT"] <= K and tiles not in found[:i]]
    return found + ([LIBRARY] if M >= 128 else [])


def semaphores_for(N: int, device: torch.device) -> Tensor:
    """Return split-k semaphores for a weight of ``N`` rows; a launch leaves them zero."""
    return new_semaphores(4 * max(1, -(-N // 64)), device)


def tiles_for(
    M: int, N: int, K: int, width: int, dtype: torch.dtype, device: torch.device, groups: tuple[str, ...] = (),
    format: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Return the tiles for ``M`` rows; ``groups``: the names of ``WARP_GROUPS`` that can run."""
    usable = lambda tiles: tiles["KERNEL"] in groups or tiles["KERNEL"] not in WARP_GROUPS  # noqa: E731
    guess = lambda rows: default(rows, N, K, format)  # noqa: E731
    op = NAMES[format] if format else f"w{width}a16"
    return tuning.choose(op, (N, K), M, dtype, device, guess, usable, groups)


def fused(x: Tensor, weight: PackedTensors, tiles: dict[str, Any] | None = None) -> Tensor:
    """Return ``x W^T + bias`` [M, out] by the fused kernel: ``x`` [M, in] with contiguous rows, M > 0."""
    packed, scale, zero, bias, semaphores, width, group_size, format, divisor = weight
    assert semaphores is not None
    (M, K), N = x.shape, packed.shape[1]
    tiles = tiles or tiles_for(M, N, K, width, x.dtype, x.device, format=format)
    block_m, block_n, warps, stages = (tiles[n] for n in ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"))
    grid_n, grid_m = -(-N // block_n), -(-M // block_m)
    split = tiles["SPLIT"] if grid_n * grid_m <= semaphores.numel() else 1
    stride = x.stride(0)
    constants = {"HAS_BIAS": bias is not None, "BLOCK_M": block_m, "BLOCK_N": block_n, "SPLIT": split}
    kernel = _float_linear_kernel if format else _linear_kernel
    constants |= compute_constants(x.dtype, kernel)
    if format:
        zero = divisor
        constants |= {"GROUP": group_size, "FORMAT": format}
    else:
        constants |= {**_layout_constants(weight, K), "WIDTH": width}
    key = (
        x.dtype, scale.dtype, zero.dtype if zero is not None else 0, bias.dtype if bias is not None else 0, N, K,
        stride, group_size, width, split, block_m, block_n, warps, stages, is_aligned(x, packed, scale), format,
    )  # fmt: skip
    before = (x, packed, scale, zero if zero is not None else scale, bias if bias is not None else scale)
    return launch_split(
        kernel, (grid_n, grid_m, split), before, (semaphores, M, N, K, stride, packed.stride(0)), (M, N),
        x.dtype, constants=constants, num_warps=warps, num_stages=stages, key=key,
    )  # fmt: skip


def _layout_constants(weight: PackedTensors, K: int) -> dict[str, Any]:
    group_size = weight.group_size
    return {
        "SLICE": slice_columns(group_size, K), "GROUP": group_size,
        "PER_SCALE": slices_per_scale(group_size, weight.width, K), "HAS_ZERO": weight.zero is not None,
    }  # fmt: skip


def dense(
    weight: PackedTensors, columns: int, dtype: torch.dtype, first: int = 0, count: int | None = None
) -> Tensor:  # fmt: skip
    """Return rows ``first : first + count`` of the weight in ``dtype``: [count, in]; ``columns`` is ``in``."""
    (tiles, N, _), width, block = weight.packed.shape, weight.width, 64
    count = N - first if count is None else count
    out = torch.empty((count, columns), dtype=dtype, device=weight.packed.device)
    if out.numel() == 0:
        return out
    if weight.format:
        packed, words, divisor = weight.packed, weight.scale, weight.divisor
        launch(
            _float_dense_kernel, (tiles, -(-count // block), 1),
            (packed, words, words if divisor is None else divisor, out, N, columns, packed.stride(0), first, count),
            {"GROUP": weight.group_size, "FORMAT": weight.format, "BLOCK_N": block}, num_warps=4, num_stages=1,
            key=(dtype, columns, N, weight.group_size, weight.format, is_aligned(packed, words, out)),
        )  # fmt: skip
        return out
    # Scales lie [groups, out]: a slice of the rows begins further along each group.
    here = weight.packed[:, first : first + count]
    scale, zero = (None if t is None else t[:, first : first + count] for t in (weight.scale, weight.zero))
    if count < N:
        scale, zero = (None if t is None else t.contiguous() for t in (scale, zero))
    assert scale is not None
    launch(
        _dense_kernel, (tiles, -(-count // block), 1),
        (here, scale, zero if zero is not None else scale, out, count, columns, here.stride(0)),
        {**_layout_constants(weight, columns), "WIDTH": width, **compute_constants(dtype, _dense_kernel),
         "BLOCK_N": block},
        num_warps=4, num_stages=1,
        key=(dtype, scale.dtype, zero.dtype if zero is not None else 0, count, columns, N, weight.group_size, width,
             is_aligned(here, scale, out)),
    )  # fmt: skip
    return out


def by_library(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``, ``x`` [M, in], by the library's product with the decoded weight, or part after part."""
    decode = lambda first, count: dense(weight, x.shape[1], x.dtype, first, count)  # noqa: E731
    return multiply_decoded(x, weight.packed.shape[1], weight.bias, MOST_BYTES, decode)


def wna16(x: Tensor, weight: PackedTensors, tiles: dict[str, Any] | None = None) -> Tensor:
    """Return ``x W^T + bias``, ``x`` [..., in]; ``weight.semaphores`` as ``semaphores_for`` makes them."""
    return over_rows(x, weight.packed.shape[1], lambda flat: product(flat, weight, tiles))


def product(x: Tensor, weight: PackedTensors, tiles: dict[str, Any] | None = None) -> Tensor:
    """Return ``x W^T + bias`` for ``x`` [M, in] with contiguous rows, M > 0, with ``tiles`` instead of the choice."""
    (M, K), N = x.shape, weight.packed.shape[1]
    groups = tuple(name for name, module in WARP_GROUPS.items() if M > LEAST_WIDE_ROWS and module.supports(x, weight))
    found = tiles or tiles_for(M, N, K, weight.width, x.dtype, x.device, groups, weight.format)
    if found["KERNEL"] in WARP_GROUPS:
        by_groups = functools.partial(WARP_GROUPS[found["KERNEL"]].product, x, weight, found)
        if tiles is not None:  # who times configurations wants this one, or its error
            return by_groups()
        y = wide.attempt(by_groups, x.device)
        if y is not None:
            return y
        found = tiles_for(M, N, K, weight.width, x.dtype, x.device, format=weight.format)
    return by_library(x, weight) if found["KERNEL"] == "library" else fused(x, weight, found)
