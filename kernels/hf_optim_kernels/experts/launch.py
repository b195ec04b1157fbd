"""From tensors to launches: which kernels compute a mixture layer, and with which tiles."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ..common import tuning
from ..common.compute_type import compute_constants
from ..common.gemm import multiprocessor_count
from ..common.launch import is_aligned, launch
from . import descriptors
from .decode import _down_kernel, _up_kernel
from .grouped import _combine_kernel, _grouped_kernel, _persistent_kernel
from .naive import UNGATED, Gate, Route, Weights, block_rows
from .routing import route
from .tiles import Tiles, fitting_stages, shared_memory

# The most tokens that are computed by the kernels of decoding.
MOST_DECODED = 16
# Columns of a product that are few, and numbers of a sum that are.
MOST_NARROW, MOST_SHORT = 2048, 4096
# Tiles of the output of a decoding step that several programs may share, at most.
MOST_SEMAPHORES = 1 << 12


class Plan(NamedTuple):
    """How a layer is computed.

    Attributes:
        block: rows of a block of the grouped products; 0 for the kernels of decoding.
        up, down: tiles of the two products.
    """

    block: int
    up: Tiles
    down: Tiles


def plan(tokens: int, top_k: int, experts: int, inner: int, hidden: int, transposed: bool, gated: bool) -> Plan:
    """Return how to compute ``tokens`` tokens, each with ``top_k`` of ``experts`` experts ``hidden -> inner``.

    Tiles are those that were fastest on an H200 for two shapes, by the rows of a block and the lengths of the sums.
    """
    if decodes(tokens, top_k, experts):
        if transposed:
            return Plan(0, Tiles(32, 64, 4, 5), Tiles(64, 64, 4, 5, split=top_k))
        return Plan(0, Tiles(16, 256, 4, 3), Tiles(16, 256, 2, 3, split=top_k))
    block = block_rows(tokens * top_k, experts)
    return Plan(block, default_tiles(block, inner, hidden, gated), default_tiles(block, hidden, inner, False))


def tuned(how: Plan, hidden: Tensor, inner: int) -> Plan:
    """Return a plan with the tiles of a tuning table (``experts-up 14336x4096x16``, by the rows of a block)."""
    d, rows = hidden.shape[1], max(1, how.block)

    def chosen(part: str, columns: int, length: int, tiles: Tiles) -> Tiles:
        found = tuning.choose(
            f"experts-{part}", (columns, length), rows, hidden.dtype, hidden.device, lambda _: tiles._asdict(),
            variant=tiles,
        )  # fmt: skip
        return Tiles(**found)

    return Plan(how.block, chosen("up", inner, d, how.up), chosen("down", d, inner, how.down))


def decodes(tokens: int, top_k: int, experts: int) -> bool:
    """Return True if pairs are so few that most are alone with their expert: each reads its matrices by itself."""
    return tokens == 1 or (tokens <= MOST_DECODED and 2 * tokens * top_k <= experts)


def default_tiles(block: int, columns: int, length: int, gated: bool) -> Tiles:
    """Return the tiles of a grouped product: rows of its blocks, columns of its output, and the length of its sums."""
    if block <= 32:
        return Tiles(64 if gated else 128, 128, 4, 4 if block == 16 else 3, described=True)
    if block == 64:
        return Tiles(64 if gated else 128, 64, 4, 4, described=True)
    if gated:
        # With few columns, blocks of one expert stand closer together.
        narrow = columns <= MOST_NARROW
        return Tiles(128, 64, 8, 4, group=4 if narrow else 8, halves=not narrow, described=True)
    # With short sums, the next tile is read while a result is stored; with long ones, that is little of the time.
    if length <= MOST_SHORT:
        return Tiles(256, 64, 8, 3, described=True, persistent=True)
    return Tiles(256, 64, 8, 4, described=True)


def mixture(
    hidden: Tensor, experts: Tensor, weights: Tensor, given: Weights, gate: Gate, how: Plan | None = None
) -> Tensor:
    """Return ``naive.mixture``: all of ``hidden``, ``experts`` and ``weights`` contiguous, biases too."""
    (tokens, d), top_k = hidden.shape, experts.shape[1]
    if tokens == 0 or top_k == 0:
        return torch.zeros_like(hidden)
    up, down = given.matrices
    count, inner = up.shape[0], down.shape[2]
    if how is None:
        how = tuned(plan(tokens, top_k, count, inner, d, given.transposed, gate.layout != UNGATED), hidden, inner)
    if how.block == 0:
        middle, semaphores = decode_up(hidden, experts, given, gate, how.up)
        return decode_down(middle, semaphores, experts, weights, given, how.down, hidden.dtype)
    found = route(experts, count, how.block)
    x = hidden.to(up.dtype)
    middle = rows_product(x, up, given.up_bias, found, top_k, False, how.block, gate, how.up)
    rows = rows_product(middle, down, given.down_bias, found, 0, True, how.block, None, how.down)
    return combine(rows, experts, weights, count, hidden.dtype)


def rows_product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    found: Route,
    top_k: int,
    by_pair: bool,
    block: int,
    gate: Gate | None = None,
    tiles: Tiles | None = None,
) -> Tensor:
    """Return ``naive.rows_product``, with the activation of ``gate``; columns of ``x`` and ``bias`` are contiguous.

    ``block`` is that of the route.
    """
    _, N, K = weight.shape
    if gate is not None and gate.layout != UNGATED:
        N //= 2
    out = torch.empty((found.order.numel(), N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    tiles = tiles or default_tiles(block, N, K, gate is not None and gate.layout != UNGATED)
    block_n = max(16, min(tiles.n, triton.next_power_of_2(N)))
    # A tile has about as many bytes, and a thread as many numbers, as with 16 bits.
    block_n = min(block_n, 128) if x.element_size() > 2 else block_n
    block_k = max(16, min(tiles.k * 2 // x.element_size(), triton.next_power_of_2(K)))
    entries, used = found.blocks.shape[0], gate or Gate()
    transposed = weight.stride(2) != 1
    # Only tiles of full size are compared with the specification.
    described = tiles.described and (block_n, block_k) == tiles[:2] and descriptors.can_describe(weight, x)
    if described and not descriptors.is_trying():
        described = descriptors.are_right(
            x, transposed, gate, block, tiles, by_pair, top_k, bias is not None, rows_product
        )
    persistent = described and tiles.persistent and top_k == 0
    kernel = _persistent_kernel if persistent else _grouped_kernel
    constants = {
        "TOP_K": top_k, "BY_PAIR": by_pair, **_gate_constants(used), "ACTIVATE": gate is not None,
        "HAS_BIAS": bias is not None, "EVEN": N % block_n == 0 and K % block_k == 0,
        "MATH": compute_constants(x.dtype, _grouped_kernel)["MATH"], "DESCRIBED": described,
        "TRANSPOSED": transposed, "BLOCK_M": block, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP": tiles.group,
        "HALVES": tiles.halves and block >= 32, "STEP": 512, "PROGRAMS": multiprocessor_count(x.device),
        "FLATTEN": True,
    }  # fmt: skip
    width = block_n * (2 if gate is not None and gate.layout != UNGATED else 1)
    stages = fitting_stages(tiles.stages, (block + width) * block_k * x.element_size(), shared_memory(x.device))
    constants = _in_order(constants, kernel)
    tensors = (x, weight, weight if bias is None else bias, out, found.order, found.offsets, found.blocks)
    numbers: tuple[int, ...] = (entries, N, K)
    given: tuple[Any, ...] = tensors
    programs = entries * -(-N // block_n)
    if described:
        given = (x, descriptors.describe(weight, block_n, block_k, used if gate else None), *tensors[2:])
    if persistent:
        given = (TensorDescriptor.from_tensor(x, [block, block_k]), *given[1:])
        programs = min(programs, multiprocessor_count(x.device))
    else:
        numbers = (*numbers, x.stride(0), *weight.stride())
    launch(
        kernel, (programs, 1, 1), (*given, used.alpha, used.offset, used.limit, *numbers), constants,
        num_warps=tiles.warps, num_stages=stages, device=x.device,
        key=(*_tensor_kinds(tensors), *map(_kind, numbers[1:]), *constants.values(), tiles.warps, stages),
    )  # fmt: skip
    return out


def combine(rows: Tensor, experts: Tensor, weights: Tensor, count: int, dtype: torch.dtype) -> Tensor:
    """Return ``naive.combine``; all tensors are contiguous."""
    (tokens, top_k), N = experts.shape, rows.shape[1]
    out = torch.empty((tokens, N), dtype=dtype, device=rows.device)
    if out.numel() == 0 or top_k == 0:
        return out.zero_()
    block = min(1024, max(16, triton.next_power_of_2(N)))
    constants = {"TOP_K": top_k, "BLOCK_N": block}
    given = (rows, experts, weights, out)
    launch(
        _combine_kernel, (tokens, -(-N // block), 1), (*given, count, N), constants, num_warps=4, num_stages=1,
        key=(*_tensor_kinds(given), _kind(count), _kind(N), *constants.values()),
    )  # fmt: skip
    return out


def decode_up(hidden: Tensor, experts: Tensor, given: Weights, gate: Gate, tiles: Tiles) -> tuple[Tensor, Tensor]:
    """Return the inputs of the second matrices, float32 ``[T k, I]``, and zeros that ``decode_down`` counts in."""
    up, d = given.matrices[0], hidden.shape[1]
    (tokens, top_k), (count, inner) = experts.shape, (up.shape[0], given.matrices[1].shape[2])
    middle = torch.empty((tokens * top_k, inner), dtype=torch.float32, device=hidden.device)
    semaphores = torch.empty(_semaphores(tokens, d), dtype=torch.int32, device=hidden.device)
    block_n, block_k = min(tiles.n, triton.next_power_of_2(inner)), min(tiles.k, triton.next_power_of_2(d))
    constants = _in_order({
        "TOP_K": top_k, "SEMAPHORES": semaphores.numel(), **_gate_constants(gate),
        "HAS_BIAS": given.up_bias is not None, "EVEN": inner % block_n == 0 and d % block_k == 0, "BLOCK_N": block_n,
        "BLOCK_K": block_k, "STAGES": tiles.stages,
    }, _up_kernel)  # fmt: skip
    tensors = (hidden, experts, up, up if given.up_bias is None else given.up_bias, middle, semaphores)
    numbers = (count, inner, d, hidden.stride(0), *up.stride())
    launch(
        _up_kernel, (tokens * top_k, -(-inner // block_n), 1),
        (*tensors, gate.alpha, gate.offset, gate.limit, *numbers), constants, num_warps=tiles.warps,
        num_stages=tiles.stages,
        key=(*_tensor_kinds(tensors), *map(_kind, numbers), *constants.values(), tiles.warps),
    )  # fmt: skip
    return middle, semaphores


def decode_down(
    middle: Tensor, semaphores: Tensor, experts: Tensor, weights: Tensor, given: Weights, tiles: Tiles,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """Return the output ``[T, d]`` from what ``decode_up`` returns; ``semaphores`` are zeros before and after."""
    down = given.matrices[1]
    (tokens, top_k), (count, d, inner) = experts.shape, down.shape
    out = torch.empty((tokens, d), dtype=dtype, device=middle.device)
    block_n, block_k = min(tiles.n, triton.next_power_of_2(d)), min(tiles.k, triton.next_power_of_2(inner))
    columns = -(-d // block_n)
    split = min(tiles.split, top_k) if columns * tokens <= semaphores.numel() else 1
    partial = out if split == 1 else torch.empty((split, tokens, d), dtype=torch.float32, device=middle.device)
    constants = _in_order({
        "TOP_K": top_k, "HAS_BIAS": given.down_bias is not None, "EVEN": d % block_n == 0 and inner % block_k == 0,
        "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split, "STAGES": tiles.stages,
    }, _down_kernel)  # fmt: skip
    bias = down if given.down_bias is None else given.down_bias
    tensors = (middle, experts, weights, down, bias, out, partial, semaphores)
    numbers = (count, d, inner, *down.stride())
    launch(
        _down_kernel, (columns, tokens, split), (*tensors, *numbers), constants, num_warps=tiles.warps,
        num_stages=tiles.stages,
        key=(*_tensor_kinds(tensors), *map(_kind, numbers), *constants.values(), tiles.warps),
    )  # fmt: skip
    return out


def _semaphores(tokens: int, d: int) -> int:
    """Return how many tiles of the output may be shared: one for 8 columns."""
    return min(MOST_SEMAPHORES, triton.next_power_of_2(-(-d // 8) * tokens))


def _gate_constants(gate: Gate) -> dict[str, Any]:
    return {"LAYOUT": gate.layout, "ACT": gate.act, "CLAMP": gate.limit != math.inf}


@cache
def _constants_of(kernel: Any) -> tuple[str, ...]:
    return tuple(name for name in kernel.arg_names if name.isupper() and len(name) > 1 and name != "ENTRIES")


def _in_order(constants: dict[str, Any], kernel: Any) -> dict[str, Any]:
    """Return the constants in the order of the kernel's parameters."""
    return {name: constants[name] for name in _constants_of(kernel)}


def _tensor_kinds(tensors: tuple[Tensor, ...]) -> tuple:
    return (*(t.dtype for t in tensors), *(is_aligned(t) for t in tensors))


def _kind(number: int) -> int:
    """Return what Triton specializes of an integer: 1, multiples of 16, and whether it fits in 32 bits."""
    return 1 if number == 1 else (16 if number % 16 == 0 else 2) + (number >= 1 << 31)
