"""From tensors to launches: three of the forward, six or seven of the backward, and one of a step.

Keys and values of each chunk are summed in parallel, the sums are turned into the states before each chunk by a scan,
and outputs are computed in parallel again. The backward does the same from the end for the sums of queries.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.compute_type import BF16, FP16, compute_constants
from ..common.launch import is_aligned, launch
from .backward_kernel import _gate_kernel, _query_kernel
from .key_kernel import _key_kernel
from .naive import LEAST, TRIG, Settings, State, state_heads
from .output_kernel import _output_kernel
from .state_kernel import _keys_kernel, _queries_kernel, _scan_kernel
from .step_kernel import _step_kernel
from .tiles import BACKWARD, ENTRIES, FORWARD, SCANNED, Tiles, padded, tiles

# Entries of the largest tile of a step.
STEP_TILE = 16384


class Call:
    """The sizes and constants that the launches of one call share.

    The last dimension of every tensor is contiguous, and of W all.
    """

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, mask: Tensor | None,
        log_gate: Tensor | None, chosen: Tiles,
    ) -> None:  # fmt: skip
        self.query, self.key, self.value, self.weight = query, key, value, weight
        self.settings, self.chosen = settings, chosen
        self.mask = mask if mask is None else mask.contiguous().view(torch.uint8)
        self.gate = log_gate if log_gate is None else log_gate.contiguous()
        (self.B, self.H, self.N, self.D), (self.G, self.M), self.DV = query.shape, key.shape[1:3], value.shape[3]
        self.m = weight.shape[1]
        self.P = state_heads(self.H, self.G, weight.shape[0])
        self.trig = settings.kind == TRIG
        self.F = self.m * (1 + self.trig)
        self.w_h = self.m * self.D if weight.shape[0] > 1 else 0
        math_type = compute_constants(query.dtype, _output_kernel)["MATH"]
        self.half = math_type == BF16.value
        precision, exact = ("tf32", "tf32x3") if math_type == FP16.value else ("ieee", "ieee")
        self.tiles = {
            "C": chosen.chunk, "BLOCK_F": chosen.features, "BLOCK_D": padded(self.D), "BLOCK_DV": padded(self.DV),
            "TRIG": self.trig, "NORMED": settings.eps >= 0, "HAS_GATE": self.gate is not None,
            "HAS_MASK": self.mask is not None, "SPLIT": self.half and weight.dtype == torch.float32, "HALF": self.half,
            "PRECISION": precision, "EXACT": exact,
        }  # fmt: skip
        # Exponents are to base 2, and angles in turns.
        root, unit = math.sqrt(settings.scale), 1 / math.tau if self.trig else math.log2(math.e)
        self.factors = (root * unit, settings.scale / 2 * unit, settings.eps, 1 / math.sqrt(self.m))
        self.slopes = (root, settings.scale)
        self.floor = settings.floor if self.trig else LEAST

    def chunks(self, tokens: int) -> int:
        """Return the chunks of ``tokens``."""
        return triton.cdiv(tokens, self.chosen.chunk)

    def sizes(self, tokens: int) -> tuple[int, ...]:
        """Return the numbers that kernels take before strides."""
        return (
            self.chunks(tokens), self.H, self.P, self.G, tokens, self.D, self.DV, self.m, self.w_h,
        )  # fmt: skip

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor on the device of the call."""
        return torch.empty(shape, dtype=dtype, device=self.query.device)

    def run(self, kernel: Any, programs: int, tensors: tuple, floats: tuple, numbers: tuple, **more: Any) -> None:
        """Launch a kernel with the tiles of the call."""
        _start(kernel, (programs, 1, 1), tensors, floats, numbers, {**self.tiles, **more}, self.chosen.warps,
               self.chosen.stages)  # fmt: skip


def forward(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, mask: Tensor | None,
    log_gate: Tensor | None, state: State | None, exact: bool = False, given: Tiles | None = None,
    amounts: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, State]:  # fmt: skip
    """Return ``naive.linear_attention``: out with the strides of ``[B, N, H, Dv]``, and the state.

    Between them, float32 ``[B, H, N]`` for the backward: the largest exponent of each query, and the logarithm to base
    2 of its denominator, ``inf`` where that was replaced. Of kind trig the former is 1 where it was, else 0.

    Args:
        exact: sums of chunks are kept in float32, so that the state is not rounded.
        given: tiles; None takes those of ``tiles``.
    """
    chosen = given or _tiles(FORWARD, query, value, weight, settings)
    call = Call(query, key, value, weight, settings, mask, log_gate, chosen)
    out = query.new_empty((call.B, call.N, call.H, call.DV)).transpose(1, 2)
    tops, logs = call.empty(call.B, call.H, call.N), call.empty(call.B, call.H, call.N)
    tops_k, parts, sums, starts, last = _states(call, state, exact)
    held = (parts, sums, starts) if settings.causal else last
    tensors = (
        query, key, value, weight, _or(call.mask, query), _or(call.gate, query), _or(amounts, logs), tops_k, *held,
        out, tops, logs,
    )  # fmt: skip
    numbers = (*call.sizes(call.N), *_strides(query, key, value, out))
    call.run(
        _output_kernel, call.B * call.H * call.chunks(call.N), tensors, (*call.factors, call.floor), numbers,
        CAUSAL=settings.causal, HAS_AMOUNTS=amounts is not None,
    )  # fmt: skip
    return out, tops, logs, last


def _states(call: Call, state: State | None, exact: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, State]:
    """Return the largest exponent of each key, and the states before each chunk of keys: the products, sums and
    references (to base 2); and the last state.
    """
    T, pairs = call.chunks(call.M), call.B * call.P
    dtype = torch.bfloat16 if call.half and not exact and call.gate is None else torch.float32
    tops = call.empty(pairs, 1 if call.trig else call.M)
    parts, sums = call.empty(pairs, T, call.F, call.DV, dtype=dtype), call.empty(pairs, T, call.F)
    references, decays = call.empty(pairs, T), call.empty(pairs, T)
    tensors = (
        call.key, call.value, call.weight, _or(call.mask, call.key), _or(call.gate, call.key), tops, parts, sums,
        references, decays,
    )  # fmt: skip
    numbers = (*call.sizes(call.M), *_strides(call.key, call.value))
    call.run(_keys_kernel, pairs * T, tensors, call.factors, numbers)
    free = not call.trig
    starts, last = _scan(call, parts, sums, references, decays, state, free, call.settings.causal, False)
    return tops, parts, sums, starts, last


def _scan(
    call: Call, parts: Tensor, sums: Tensor, references: Tensor, decays: Tensor, state: State | None, free: bool,
    keep: bool, reverse: bool,
) -> tuple[Tensor, State]:  # fmt: skip
    """Turn the sums of chunks into states before (or after) each, in place; return their references and the last."""
    pairs, T = references.shape
    starts = call.empty(pairs, T)
    last = State(
        call.empty(call.B, call.P, call.F, call.DV), call.empty(call.B, call.P, call.F), call.empty(call.B, call.P)
    )
    given = last if state is None else State(*(each.contiguous() for each in state))
    size, block = call.F * call.DV, min(ENTRIES, triton.next_power_of_2(call.F * call.DV))
    blocks = triton.cdiv(size, block)
    tensors = (parts, sums, references, decays, *given, starts, *last)
    constants = {
        "STEP": SCANNED, "BLOCK": block, "FREE": free, "HAS_GIVEN": state is not None, "KEEP": keep,
        "REVERSE": reverse, "PRECISION": "tf32" if parts.dtype == torch.bfloat16 else "ieee",
    }  # fmt: skip
    grid = (blocks + triton.cdiv(call.F, block), pairs, 1)
    _start(_scan_kernel, grid, tensors, (), (T, size, call.F, blocks), constants, 4, 1)
    return starts, last


def backward(
    grad_out: Tensor, out: Tensor, tops: Tensor, logs: Tensor, query: Tensor, key: Tensor, value: Tensor,
    weight: Tensor, settings: Settings, mask: Tensor | None, log_gate: Tensor | None, state: State | None,
    given: Tiles | None = None, columns: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return ``naive.gradients``; ``out``, ``tops`` and ``logs`` are those of ``forward``.

    Args:
        columns: return also the gradients of the logarithms of what the columns of W are multiplied with, ``[P, D]``.
    """
    chosen = given or _tiles(BACKWARD, query, value, weight, settings)
    call = Call(query, key, value, weight, settings, mask, log_gate, chosen)
    causal, pairs = settings.causal, call.B * call.P
    tops_k, parts, sums, starts, last = _states(call, state, False)
    held = (parts, sums, starts) if causal else last
    T, dtype = call.chunks(call.N), parts.dtype
    later, later_sums = call.empty(pairs, T, call.F, call.DV, dtype=dtype), call.empty(pairs, T, call.F)
    references, decays, delta = call.empty(pairs, T), call.empty(pairs, T), torch.empty_like(logs)
    masked = {"HAS_MASK": call.gate is not None and call.mask is not None}
    tensors = (
        query, grad_out, out, weight, _or(call.gate, query), _or(call.mask, query), tops, logs, delta, later,
        later_sums, references, decays,
    )  # fmt: skip
    numbers = (*call.sizes(call.N), *_strides(query, grad_out, out))
    call.run(_queries_kernel, pairs * T, tensors, call.factors, numbers, **masked)
    ends, after = _scan(call, later, later_sums, references, decays, None, True, causal, True)

    grad_query = query.new_empty(query.shape)
    flows_q = call.empty(call.B, call.H, call.N) if call.gate is not None else logs
    floats = (*call.factors, *call.slopes)
    by_queries = call.empty(call.B, call.H, T, call.D) if columns else logs
    by_keys = call.empty(call.B, call.P, call.chunks(call.M), call.D) if columns else logs
    shared = (
        query, key, value, weight, _or(call.mask, query), _or(call.gate, query), tops_k, tops, logs, delta, grad_out,
    )  # fmt: skip
    strides = _strides(query, key, value, grad_out)
    call.run(
        _query_kernel, call.B * call.H * T, (*shared, *held, grad_query, flows_q, by_queries), floats,
        (*call.sizes(call.N), *strides, *_strides(grad_query)), CAUSAL=causal, HAS_COLUMNS=columns,
    )  # fmt: skip
    grad_key = key.new_empty((call.B, call.P, call.M, call.D))
    grad_value = value.new_empty((call.B, call.P, call.M, call.DV))
    flows_k = call.empty(call.B, call.P, call.M) if call.gate is not None else logs
    held_k = (later, later_sums, ends) if causal else after
    call.run(
        _key_kernel, pairs * call.chunks(call.M), (*shared, *held_k, grad_key, grad_value, flows_k, by_keys),
        floats, (*call.sizes(call.M), *strides, *_strides(grad_key, grad_value)), CAUSAL=causal, HAS_COLUMNS=columns,
        SINGLE=call.m <= chosen.features,
    )  # fmt: skip
    grad_gate = None
    if call.gate is not None:
        grad_gate = torch.empty_like(call.gate)
        given_gates = (
            call.gate, _or(call.mask, query), flows_q, flows_k, parts, sums, starts, later, later_sums, ends, grad_gate,
        )  # fmt: skip
        numbers = (T, call.H, call.P, call.N, call.F * call.DV, call.F)
        constants = {"C": chosen.chunk, "BLOCK": 1024, "HAS_MASK": call.mask is not None, "FREE": not call.trig}
        _start(_gate_kernel, (pairs * T, 1, 1), given_gates, (), numbers, constants, 4, 1)
    if call.P != call.G:
        grad_key, grad_value = (each.unflatten(1, (call.G, -1)).sum(2) for each in (grad_key, grad_value))
    grad_columns = None
    if columns:
        grad_columns = by_keys.sum((0, 2)) + by_queries.sum((0, 2)).unflatten(0, (call.P, -1)).sum(1)
    return grad_query, grad_key, grad_value, grad_gate, grad_columns


def step(
    query: Tensor, key: Tensor, value: Tensor, weight: Tensor, settings: Settings, log_gate: Tensor | None,
    state: State, amounts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Return ``naive.step``: one launch, which also brings the state up to date."""
    (B, H, _, D), G, DV, m = query.shape, key.shape[1], value.shape[3], weight.shape[1]
    P, trig = state.state.shape[1], settings.kind == TRIG
    rows = triton.next_power_of_2(H // P)
    block_d, block_dv = triton.next_power_of_2(D), triton.next_power_of_2(DV)
    largest = triton.next_power_of_2(max(1, STEP_TILE // (rows * max(block_d, block_dv))))
    out = query.new_empty((B, H, 1, DV))
    root = math.sqrt(settings.scale) / (math.tau if trig else 1.0)
    floats = (root, settings.scale / 2, settings.eps, 1 / math.sqrt(m), settings.floor if trig else LEAST)
    numbers = (
        H, P, G, D, DV, m, m * D if weight.shape[0] > 1 else 0, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2],
    )  # fmt: skip
    constants = {
        "ROWS": rows, "BLOCK_F": min(largest, triton.next_power_of_2(m)), "BLOCK_D": block_d, "BLOCK_DV": block_dv,
        "TRIG": trig, "NORMED": settings.eps >= 0, "HAS_GATE": log_gate is not None, "HAS_AMOUNTS": amounts is not None,
    }  # fmt: skip
    tensors = (query, key, value, weight, _or(log_gate, query), _or(amounts, query), *state, out)
    _start(_step_kernel, (B * P, 1, 1), tensors, floats, numbers, constants, 8, 1)
    return out


def _tiles(direction: str, query: Tensor, value: Tensor, weight: Tensor, settings: Settings) -> Tiles:
    trig = settings.kind == TRIG
    return tiles(direction, weight.shape[1], query.shape[3], value.shape[3], trig, query.dtype, query.device)


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])


def _start(
    kernel: Any, grid: tuple[int, int, int], tensors: tuple, floats: tuple, numbers: tuple, constants: dict[str, Any],
    warps: int, stages: int,
) -> None:  # fmt: skip
    if not grid[0] * grid[1]:
        return
    key = (
        *(each.dtype for each in tensors), *(is_aligned(each) for each in tensors), *_kinds(numbers),
        *constants.values(), warps, stages,
    )  # fmt: skip
    launch(kernel, grid, (*tensors, *floats, *numbers), constants, num_warps=warps, num_stages=stages, key=key)


def _kinds(numbers: tuple) -> tuple[int, ...]:
    """Return what Triton specializes of integers: 1, multiples of 16, and whether they fit in 32 bits."""
    return tuple(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor, or another in place of none."""
    return other if tensor is None else tensor
