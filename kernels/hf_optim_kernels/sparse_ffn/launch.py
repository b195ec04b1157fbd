"""From tensors to the three launches of a sparse feed-forward layer."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..common import tuning
from ..common.launch import begins_early, is_aligned, launch
from ..experts.activation import GELU, GELU_TANH, RELU, SILU
from .joined import MOST_NUMBERS, _sum_kernel, _units_kernel
from .kernel import _choose_kernel, _down_kernel, _project_kernel
from .naive import Layer, Rows

ACTS = {"silu": (SILU, 1.0), "gelu": (GELU, 1.0), "gelu_tanh": (GELU_TANH, 1.0), "relu": (RELU, 1.0)}
"""Activation -> its number in the kernel, and its ``alpha``."""
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MOST_BLOCK = 256
"""Units of a block whose logits a program holds."""
LEAST_CODES = 16
"""Codes that a program reads at a time, at least."""
MOST_LOGITS = 128
"""Logits that a program holds, at most; a block of more units is held whole."""


class Tiles(NamedTuple):
    """Tiles of the three launches.

    Attributes:
        r, r_k, r_warps: rows of C1, and columns at a time, of the first.
        b, b_r, b_k, b_warps: blocks, columns of C2 and of W1 at a time, of the second.
        d, d_b, d_warps, split: columns of W2, chosen rows at a time, and programs that share a tile, of the third.
        stages: loads under way.
        early: launches begin while those before them end, where the device can.
        programs: that share the blocks of a token and read the chosen rows of both matrices (``joined``); 0 to read
            them in launches of their own.
    """

    r: int = 4
    r_k: int = 512
    r_warps: int = 4
    b: int = 4
    b_r: int = 64
    b_k: int = 512
    b_warps: int = 4
    d: int = 128
    d_b: int = 32
    d_warps: int = 4
    split: int = 4
    stages: int = 3
    early: bool = False
    programs: int = 0


def default_tiles(layer: Layer) -> Tiles:
    """Return the tiles of a layer: those whose launches were fastest on an H200, for 4,096 inputs and 16,384 units.

    There launches did not gain by beginning early: from 4 to 32 units of a block a layer took up to 1.7 times as long.
    """
    block, bits = layer.block, layer.up.bits
    first = (4, 1024) if block <= 4 else (2, 1024) if block <= 8 else (1, 2048)
    if bits == 4:
        second = (8, 64, 512, 4)
    elif bits == 8:
        second = (2, 64, 1024, 4)
    elif block <= 4:
        second = (4, 128, 256, 2)
    elif block <= 8:
        second = (4, 128, 1024, 8)
    else:
        second = (2, 64, 1024, 4) if block <= 16 else (1, 128, 1024, 4)
    third = (64, 32, 2, 16 if bits < 16 else 4 if block > 32 else 8)
    if block <= 4 and bits == 16:
        third = (64, 64, 4, 4)
    b = max(1, min(second[0], MOST_LOGITS // triton.next_power_of_2(block)))
    return Tiles(*first, 4, b, *second[1:], *third)


def name_of(layer: Layer) -> str:
    """Return the name of a layer's entries in tuning tables."""
    return f"sparse-ffn{layer.up.bits}"


def shape_of(layer: Layer) -> tuple[int, ...]:
    """Return what precedes the rows in the key of an entry: outputs, inputs, units, and units of a block."""
    return layer.down.columns, layer.first.shape[1], len(layer.second), layer.block


def chosen_tiles(x: Tensor, layer: Layer) -> Tiles:
    """Return the tiles of a tuning table, else the default ones."""

    def guess(_: int) -> dict[str, Any]:
        return default_tiles(layer)._asdict()

    return Tiles(**tuning.choose(name_of(layer), shape_of(layer), len(x), x.dtype, x.device, guess))


def unsupported(x: Tensor, layer: Layer) -> str | None:
    """Return why the kernels do not compute a layer for ``x``; None if they do."""
    if x.dtype not in DTYPES:
        return f"{x.dtype} inputs"
    if layer.act not in ACTS:
        return f"the activation {layer.act}"
    if layer.block > MOST_BLOCK:
        return f"blocks of {layer.block} units, at most {MOST_BLOCK}"
    for rows in matrices(layer):
        if rows.bits == 16 and rows.data.dtype != x.dtype:
            return f"{rows.data.dtype} weights for {x.dtype} inputs"
        if rows.bits < 16 and power_of_two_in(rows.group * rows.bits // 8) < LEAST_CODES:
            return f"groups of {rows.group} codes, which no power of two of at least {LEAST_CODES} bytes divides"
    if layer.first.dtype != x.dtype or layer.second.dtype != x.dtype:
        return f"a controller of {layer.first.dtype} for {x.dtype} inputs"
    if x.is_cuda and torch.cuda.get_device_capability(x.device) < (8, 0):
        return "a compute capability below 8.0"
    return None


def matrices(layer: Layer) -> list[Rows]:
    """Return the matrices of the units."""
    return [rows for rows in (layer.up, layer.gate, layer.down) if rows is not None]


def power_of_two_in(number: int) -> int:
    """Return the largest power of two that divides a number above 0."""
    return number & -number


class Memory(NamedTuple):
    """What one launch leaves for the next.

    Attributes:
        projected: x C1, ``[T, rank]``.
        units, inner: the chosen units int32 ``[T, blocks]``, and what they compute, float32.
        partial: ``[split, T, out]``, of programs that share a tile; the output itself without a split.
        semaphores: of these tiles, int32.
    """

    projected: Tensor
    units: Tensor
    inner: Tensor
    out: Tensor
    partial: Tensor
    semaphores: Tensor


class Sums(NamedTuple):
    """How W2 is read: chosen rows and columns (of 4-bit codes bytes) at a time, tiles, and programs for each tile."""

    rows: int
    columns: int
    tiles: int
    split: int


def sparse_ffn(x: Tensor, layer: Layer, tiles: Tiles | None = None) -> Tensor:
    """Return ``naive.sparse_ffn``; all tensors are contiguous."""
    if len(x) == 0:
        return x.new_empty((0, layer.down.columns))
    tiles = tiles or chosen_tiles(x, layer)
    if tiles.early and not begins_early(x):
        tiles = tiles._replace(early=False)
    if tiles.programs and not can_join(layer, tiles):
        tiles = tiles._replace(programs=0)
    memory = allocate(x, layer, tiles)
    project(x, layer, tiles, memory)
    if tiles.programs:
        join(x, layer, tiles, memory)
    else:
        choose(x, layer, tiles, memory)
        combine(layer, tiles, memory)
    return memory.out


def can_join(layer: Layer, tiles: Tiles) -> bool:
    """Return True if one launch can read the rows of both matrices: floats, and a row of W2 fits into a program."""
    return all(rows.bits == 16 for rows in matrices(layer)) and _padded(layer.down.columns) <= MOST_NUMBERS


def allocate(x: Tensor, layer: Layer, tiles: Tiles) -> Memory:
    """Return the memory of the three launches."""
    tokens, rank, D = len(x), len(layer.first), layer.down.columns
    blocks, how = len(layer.second) // layer.block, sums_of(layer, tiles)
    out = torch.empty((tokens, D), dtype=x.dtype, device=x.device)
    if tiles.programs:
        how = Sums(0, 0, 1, tiles.programs)
    return Memory(
        torch.empty((tokens, rank), dtype=x.dtype, device=x.device),
        torch.empty((tokens, blocks), dtype=torch.int32, device=x.device),
        torch.empty((tokens, blocks), dtype=torch.float32, device=x.device),
        out,
        out
        if how.split == 1 and not tiles.programs
        else torch.empty((how.split, tokens, D), dtype=torch.float32, device=x.device),
        torch.empty(triton.next_power_of_2(tokens * how.tiles), dtype=torch.int32, device=x.device),
    )


def sums_of(layer: Layer, tiles: Tiles) -> Sums:
    """Return how W2 is read."""
    D, blocks = layer.down.columns, len(layer.second) // layer.block
    columns, rows = _step(layer.down, tiles.d, D), min(tiles.d_b, triton.next_power_of_2(blocks))
    count = -(-(D // 2 if layer.down.bits == 4 else D) // columns)
    return Sums(rows, columns, count, max(1, min(tiles.split, -(-blocks // rows))))


def project(x: Tensor, layer: Layer, tiles: Tiles, memory: Memory) -> None:
    """Compute x C1, and clear the semaphores."""
    (tokens, K), rank = x.shape, len(layer.first)
    r, r_k = min(tiles.r, triton.next_power_of_2(rank)), min(tiles.r_k, triton.next_power_of_2(K))
    _launch(
        _project_kernel, (tokens, -(-rank // r), 1), (x, layer.first, memory.projected, memory.semaphores), (rank, K),
        {"SEMAPHORES": len(memory.semaphores), "EVEN": rank % r == 0 and K % r_k == 0, "BLOCK_R": r, "BLOCK_K": r_k,
         "STAGES": tiles.stages, "EARLY": tiles.early}, tiles.r_warps, tiles.stages,
    )  # fmt: skip


def choose(x: Tensor, layer: Layer, tiles: Tiles, memory: Memory) -> None:
    """Choose the units, and compute them."""
    (tokens, K), rank, blocks = x.shape, len(layer.first), len(layer.second) // layer.block
    up, gate, (act, alpha) = layer.up, layer.gate, ACTS[layer.act]
    padded = triton.next_power_of_2(layer.block)
    b = max(1, min(tiles.b, triton.next_power_of_2(blocks)))
    b_r, b_k = min(tiles.b_r, triton.next_power_of_2(rank)), _step(up, tiles.b_k, K)
    none = layer.first  # stands for a tensor that is not there
    tensors = (
        x, memory.projected, layer.second, _or(layer.logit_bias, none), up.data, _or(up.scale, none),
        _or(up.bias, none), none if gate is None else gate.data, none if gate is None else _or(gate.scale, none),
        none if gate is None else _or(gate.bias, none), memory.units, memory.inner,
    )  # fmt: skip
    whole = blocks % b == 0 and padded == layer.block
    _launch(
        _choose_kernel, (tokens, -(-blocks // b), 1), tensors, (layer.block, blocks, rank, K, up.group, alpha),
        {"NP": padded, "LOGIT_BIAS": layer.logit_bias is not None, "BIAS": up.bias is not None,
         "GATE_BIAS": gate is not None and gate.bias is not None, "GATED": gate is not None, "ACT": act,
         "WEIGHTED": layer.weighted, "BITS": up.bits, "EVEN_R": rank % b_r == 0 and whole,
         "EVEN": K % b_k == 0 and blocks % b == 0, "BLOCK_B": b, "BLOCK_R": b_r, "BLOCK_K": b_k,
         "STAGES": tiles.stages, "ONCE": rank <= b_r, "EARLY": tiles.early}, tiles.b_warps, tiles.stages,
    )  # fmt: skip


def combine(layer: Layer, tiles: Tiles, memory: Memory) -> None:
    """Add up the chosen rows of W2."""
    down, (tokens, blocks), D, how = layer.down, memory.units.shape, layer.down.columns, sums_of(layer, tiles)
    bias, scale = _or(layer.bias, memory.out), _or(down.scale, memory.out)
    tensors = (memory.units, memory.inner, down.data, scale, bias, memory.out, memory.partial, memory.semaphores)
    even = blocks % how.rows == 0 and how.tiles * how.columns == (D // 2 if down.bits == 4 else D)
    _launch(
        _down_kernel, (tokens, how.tiles, how.split), tensors, (blocks, D, down.group),
        {"HAS_BIAS": layer.bias is not None, "BITS": down.bits, "EVEN": even, "BLOCK_B": how.rows,
         "BLOCK_D": how.columns, "SPLIT": how.split, "STAGES": tiles.stages, "EARLY": tiles.early}, tiles.d_warps,
        tiles.stages,
    )  # fmt: skip


def join(x: Tensor, layer: Layer, tiles: Tiles, memory: Memory) -> None:
    """Choose the units, read their rows of both matrices, and add up the parts of the programs."""
    (tokens, K), rank, blocks = x.shape, len(layer.first), len(layer.second) // layer.block
    up, gate, (act, alpha), D = layer.up, layer.gate, ACTS[layer.act], layer.down.columns
    width, padded = _padded(D), _padded(layer.block)
    b = max(1, min(tiles.b, MOST_NUMBERS // width, _padded(blocks)))
    b_r, b_k, programs = min(tiles.b_r, _padded(rank)), min(tiles.b_k, _padded(K)), tiles.programs
    whole, none = blocks % b == 0, layer.first  # stands for a tensor that is not there
    tensors = (
        x, memory.projected, layer.second, _or(layer.logit_bias, none), up.data, _or(up.bias, none),
        none if gate is None else gate.data, none if gate is None else _or(gate.bias, none), layer.down.data,
        memory.units, memory.partial,
    )  # fmt: skip
    _launch(
        _units_kernel, (tokens, programs, 1), tensors, (layer.block, blocks, rank, K, D, alpha),
        {"NP": padded, "LOGIT_BIAS": layer.logit_bias is not None, "BIAS": up.bias is not None,
         "GATE_BIAS": gate is not None and gate.bias is not None, "GATED": gate is not None, "ACT": act,
         "WEIGHTED": layer.weighted, "EVEN_R": rank % b_r == 0 and whole and padded == layer.block,
         "EVEN": K % b_k == 0 and whole,
         "EVEN_D": width == D and whole, "BLOCK_B": b, "BLOCK_R": b_r, "BLOCK_K": b_k, "BLOCK_D": width,
         "STAGES": tiles.stages, "ONCE": rank <= b_r, "PROGRAMS": programs, "EARLY": tiles.early}, tiles.b_warps,
        tiles.stages,
    )  # fmt: skip
    columns = min(tiles.d, width)
    _launch(
        _sum_kernel, (tokens, -(-D // columns), 1), (memory.partial, _or(layer.bias, memory.out), memory.out), (D,),
        {"HAS_BIAS": layer.bias is not None, "BLOCK_D": columns, "PROGRAMS": programs, "PADDED": _padded(programs),
         "EARLY": tiles.early}, tiles.d_warps, tiles.stages,
    )  # fmt: skip


def _padded(number: int) -> int:
    return triton.next_power_of_2(number)


def _step(rows: Rows, wanted: int, columns: int) -> int:
    """Return how many columns, of 4-bit codes bytes, a program takes at a time: of codes not more than one group's."""
    if rows.bits == 16:
        return min(wanted, triton.next_power_of_2(columns))
    return min(wanted, power_of_two_in(rows.group * rows.bits // 8))


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    return other if tensor is None else tensor


def _launch(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple[Tensor, ...], numbers: tuple, constants: dict[str, Any],
    warps: int, stages: int,
) -> None:  # fmt: skip
    kinds = (*(t.dtype for t in tensors), is_aligned(*tensors), *(is_aligned(t) for t in tensors))
    launch(
        kernel, grid, (*tensors, *numbers), constants, num_warps=warps, num_stages=stages, device=tensors[0].device,
        key=(*kinds, *(_kind(n) for n in numbers), *constants.values(), warps, stages), early=constants["EARLY"],
    )  # fmt: skip


def _kind(number: int | float) -> Any:
    """Return what Triton specializes of a number: of an integer 1 and multiples of 16."""
    return "float" if isinstance(number, float) else 1 if number == 1 else 16 if number % 16 == 0 else 2
