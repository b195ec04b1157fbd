"""From tensors to launches: which kernels compute a mixture layer for a number of tokens, and with which tiles."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from ..experts import op as pair_lists
from ..experts.naive import Route
from ..wna16 import float4
from ..wna16.naive import slice_columns, slices_per_scale
from .kernel import _combine_kernel, _down_kernel, _pairs_kernel
from .naive import FLOAT8, StackedWeight, pairs_per_row

# Pairs up to which every pair reads its expert by itself: a second reading of an expert comes from the cache, and two
# launches, of the route and of the sum over pairs, are saved. Beyond a share of the experts, many are read again.
MOST_SINGLE_PAIRS, MOST_SINGLE_SHARE = 32, 4
# Programs that keep the memory of an H200 busy.
WANTED_PROGRAMS = 360


def unsupported_reason(weight: Any) -> str | None:
    """Return why these kernels do not read a matrix, given by its ``QuantizedWeight``; None if they do."""
    if weight.kind not in ("int", "float4") or weight.inputs is not None:
        return "the kernels multiply integers or 4-bit floats with inputs that are not quantized"
    if weight.ordered:
        return "its columns are reordered"
    if weight.group_size < weight.shape[1] and weight.group_size % 16:
        return f"group size {weight.group_size} is not a multiple of 16"
    return None


def reads(weight: StackedWeight) -> bool:
    """Return True if these kernels multiply with a weight; otherwise the specification computes the product."""
    plain = weight.packed.dtype != FLOAT8 and weight.order is None and weight.inputs == 0
    return plain and (weight.group_size >= weight.columns or weight.group_size % 16 == 0)


def is_single(tokens: int, top_k: int, experts: int) -> bool:
    """Return True if every pair is computed by programs of its own, without sorting."""
    pairs = tokens * top_k
    return tokens == 1 or (pairs <= MOST_SINGLE_PAIRS and pairs * MOST_SINGLE_SHARE <= experts)


_TILE_NAMES = ("BLOCK_M", "BLOCK_N", "SPLIT", "num_warps", "num_stages")
# Pairs of an expert up to which tiles are used; then the tiles, and those for weights with zero points, whose sums need
# registers. The compiler spills none of them for sm_90, but the last one (56 bytes; it is still the fastest).
_MANY: tuple[tuple[float, tuple[int, ...], tuple[int, ...]], ...] = (
    (4, (8, 64, 1, 4, 4), (8, 64, 1, 4, 4)),
    (8, (16, 64, 1, 4, 4), (16, 64, 1, 4, 4)),
    (32, (32, 128, 1, 4, 3), (32, 64, 1, 4, 3)),
    (64, (64, 64, 1, 4, 3), (64, 64, 1, 4, 3)),
    (math.inf, (128, 128, 1, 8, 3), (64, 64, 1, 4, 3)),
)
# Bytes of shared memory that the last two need.
_LARGEST, _LARGE = 229376, 114688


def default(
    pairs: int, experts: int, N: int, K: int, width: int, single: bool, zeros: bool = False, memory: int = _LARGEST
) -> dict[str, int]:
    """Return tiles for ``pairs`` of products with matrices [N, K], by what was fast on an H200.

    Args:
        single: every pair is a block.
        zeros: the weight has zero points.
        memory: bytes of shared memory that a program can have.
    """
    steps = -(-K * width // (64 * 16))
    if single:
        tiles, warps = -(-N // 64) * pairs, 2 if K >= 4096 else 4
        split = next(s for s in (1, 2, 4, 8) if s == 8 or tiles * s >= WANTED_PROGRAMS or 4 * s > steps)
        return dict(zip(_TILE_NAMES, (8, 64, split, warps, 4 if steps > 3 else 3), strict=True))
    # The average expert has this many pairs: a smaller block reads its weight several times, a larger one multiplies
    # more rows that are not there.
    mean = pairs / max(1, min(experts, pairs))
    found = next(own[zeros] for most, *own in _MANY if mean <= most)
    if found[0] > 64 and memory < _LARGEST:
        found = _MANY[-2][1]
    if found[0] > 16 and memory < _LARGE:
        found = (*found[:-1], 2)
    return dict(zip(_TILE_NAMES, found, strict=True))


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Return the bytes of shared memory that a program can have on a device."""
    if device.type != "cuda":
        return _LARGEST
    return int(getattr(torch.cuda.get_device_properties(device), "shared_memory_per_block_optin", _LARGE - 1))


def _tiles_for(pairs: int, weight: StackedWeight, single: bool) -> dict[str, int]:
    size = weight.rows, weight.columns, weight.width
    memory = shared_memory(weight.packed.device)
    return default(pairs, weight.experts, *size, single, weight.zero is not None, memory)


def linear(
    x: Tensor,
    experts: Tensor,
    weight: StackedWeight,
    counters: Tensor,
    *,
    route: Route | None = None,
    gate: bool = False,
    from_slot: bool = False,
    to_slot: bool = False,
    defined: bool = True,
    tiles: dict[str, int] | None = None,
) -> Tensor:
    """Return the product of each pair [T k, out]; with ``gate`` ``silu(gate) * up`` of it, [T k, out / 2].

    Args:
        x: [T, in] or [T k, in] by pair, or by slot with ``from_slot``; columns are contiguous.
        experts: int64 [T, k], contiguous.
        counters: made by ``semaphores``.
        route: blocks of ``tiles["BLOCK_M"]`` pairs; None where every pair is a block.
        from_slot, to_slot: rows are in the order of the route.
        defined: rows of pairs that no expert computes are zero; otherwise undefined.
        tiles: instead of ``default``.
    """
    pairs, K, N, E = experts.numel(), weight.columns, weight.rows, weight.experts
    tiles = tiles or _tiles_for(pairs, weight, route is None)
    block_m, block_n = tiles["BLOCK_M"], tiles["BLOCK_N"]
    out = (torch.zeros if defined else torch.empty)((pairs, N // 2 if gate else N), dtype=x.dtype, device=x.device)
    if not out.numel():
        return out
    blocks = pairs if route is None else route.blocks.shape[0]
    grid_n = -(-N // block_n)
    split = tiles["SPLIT"] if grid_n * blocks <= counters.numel() else 1
    partial = out
    if split > 1:
        partial = torch.empty(grid_n * blocks * split * block_n * block_m, dtype=torch.float32, device=x.device)
    order, offsets, listed = (experts, experts, experts) if route is None else route
    zero = _zero(weight)
    each = 1 if from_slot else pairs_per_row(x, experts)
    strides = (x.stride(0), weight.packed.stride(0), weight.packed.stride(1), weight.scale.stride(0), zero.stride(0))
    constants = {
        **_layout(weight), **compute_constants(x.dtype, _pairs_kernel), "BLOCK_M": block_m,
        "BLOCK_N": block_n, "SPLIT": split, "EACH": each, "GATE": gate, "LISTED": route is not None,
        "FROM_SLOT": from_slot, "TO_SLOT": to_slot,
    }  # fmt: skip
    launch(
        _pairs_kernel, (grid_n, blocks, split),
        (x, weight.packed, weight.scale, zero, out, partial, counters, experts, order, offsets, listed, len(x), N, K, E,
         *strides),
        constants, num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
        key=(x.dtype, weight.scale.dtype, experts.dtype, N, K, E, *strides, *tiles.values(), *constants.values(),
             is_aligned(x, weight.packed, experts, order, listed)),
    )  # fmt: skip
    return out


def weighted_sum(
    inner: Tensor, experts: Tensor, weights: Tensor, weight: StackedWeight, counters: Tensor,
    tiles: dict[str, int] | None = None,
) -> Tensor:  # fmt: skip
    """Return the second product, weighted and summed over the pairs of each token: [T, out] for inner [T k, in]."""
    (tokens, top_k), K, N, E = experts.shape, weight.columns, weight.rows, weight.experts
    tiles = tiles or _tiles_for(tokens * top_k, weight, True)
    block_n, split = tiles["BLOCK_N"], tiles["SPLIT"]
    grid_n = -(-N // block_n)
    out = torch.empty((tokens, N), dtype=inner.dtype, device=inner.device)
    partial = torch.empty(tokens * grid_n * top_k * split * block_n, dtype=torch.float32, device=inner.device)
    zero = _zero(weight)
    strides = (weight.packed.stride(0), weight.packed.stride(1), weight.scale.stride(0), zero.stride(0))
    constants = {
        **_layout(weight), **compute_constants(inner.dtype, _down_kernel),
        "BLOCK_M": tiles["BLOCK_M"], "BLOCK_N": block_n, "TOP_K": top_k, "SPLIT": split,
    }  # fmt: skip
    launch(
        _down_kernel, (grid_n, tokens, top_k * split),
        (inner, weight.packed, weight.scale, zero, out, partial, counters, experts, weights, N, K, E, *strides),
        constants, num_warps=tiles["num_warps"], num_stages=tiles["num_stages"],
        key=(inner.dtype, weight.scale.dtype, experts.dtype, weights.dtype, N, K, E, *strides, *tiles.values(),
             *constants.values(), is_aligned(inner, weight.packed, experts, weights)),
    )  # fmt: skip
    return out


def combine(pairs: Tensor, experts: Tensor, weights: Tensor, count: int) -> Tensor:
    """Return the weighted sum [T, N] of the rows [T k, N] of each token's pairs that one of ``count`` experts has."""
    (tokens, top_k), N = experts.shape, pairs.shape[1]
    out = torch.empty((tokens, N), dtype=pairs.dtype, device=pairs.device)
    block = 1024 if tokens < 256 else 2048
    launch(
        _combine_kernel, (-(-N // block), tokens, 1), (pairs, experts, weights, out, N, count),
        {"TOP_K": top_k, "BLOCK_N": block}, num_warps=4, num_stages=1,
        key=(pairs.dtype, experts.dtype, weights.dtype, N, count, top_k, block, is_aligned(experts, weights)),
    )  # fmt: skip
    return out


def packed_experts(
    hidden: Tensor,
    experts: Tensor,
    weights: Tensor,
    up: StackedWeight,
    down: StackedWeight,
    counters: Tensor,
    tiles: tuple[dict[str, int], dict[str, int]] | None = None,
    single: bool | None = None,
) -> Tensor:
    """Return ``naive.packed_experts``. ``tiles`` of both products and ``single`` replace the choices."""
    tokens, top_k = experts.shape
    if not hidden.numel() or not top_k:
        return torch.zeros_like(hidden)
    hidden = hidden if hidden.stride(-1) == 1 else hidden.contiguous()
    experts, weights = experts.contiguous(), weights.contiguous()
    single = is_single(tokens, top_k, up.experts) if single is None else single
    pairs = tokens * top_k
    first, second = tiles or (_tiles_for(pairs, up, single), _tiles_for(pairs, down, single))
    if single and tokens * -(-down.rows // second["BLOCK_N"]) <= counters.numel():
        inner = linear(hidden, experts, up, counters, gate=True, to_slot=True, defined=False, tiles=first)
        return weighted_sum(inner, experts, weights, down, counters, second)
    second = second | {"BLOCK_M": first["BLOCK_M"]}
    route = pair_lists._route(experts, up.experts, first["BLOCK_M"])
    inner = linear(hidden, experts, up, counters, route=route, gate=True, to_slot=True, defined=False, tiles=first)
    out = linear(inner, experts, down, counters, route=route, from_slot=True, defined=False, tiles=second)
    return combine(out, experts, weights, up.experts)


def expert_linear(x: Tensor, experts: Tensor, weight: StackedWeight, counters: Tensor) -> Tensor:
    """Return ``naive.expert_linear``."""
    x = x if x.stride(-1) == 1 else x.contiguous()
    experts = experts.contiguous()
    if is_single(experts.shape[0], experts.shape[1], weight.experts):
        return linear(x, experts, weight, counters)
    tiles = _tiles_for(experts.numel(), weight, False)
    route = pair_lists._route(experts, weight.experts, tiles["BLOCK_M"])
    return linear(x, experts, weight, counters, route=route, tiles=tiles)


def _zero(weight: StackedWeight) -> Tensor:
    """Return the zero points, the divisors of NVFP4, or a tensor that is not read."""
    found = weight.zero if weight.zero is not None else weight.divisor
    return weight.scale if found is None else found


def _layout(weight: StackedWeight) -> dict[str, Any]:
    size, columns = weight.group_size, weight.columns
    return {
        "SLICE": float4.SLICE if weight.format else slice_columns(size, columns), "GROUP": size,
        "PER_SCALE": slices_per_scale(size, weight.width, columns), "HAS_ZERO": weight.zero is not None,
        "WIDTH": weight.width, "FORMAT": weight.format,
    }  # fmt: skip
