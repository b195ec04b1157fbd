"""From tensors to launches: the forward, the backward, and the merging of pieces."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor

from ..common.compute_type import compute_constants
from ..common.launch import is_aligned, launch
from .backward_kernel import _delta_kernel, _key_kernel, _query_kernel
from .items import Plan
from .kernel import _forward_kernel
from .merge_kernel import _merge_kernel
from .tiles import FORWARD, KEYS, QUERIES, Tiles, padded, tiles

# Rows of a program that merges pieces, and of one that sums dO O.
MERGED, SUMMED = 16, 32


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    layout: Any,
    plan: Plan,
    scale: float,
    ramp: Tensor | None = None,
    given: Tiles | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``naive.sparse_attention``: out with the strides of ``[B, N, H, Dv]``, lse float32.

    The last dimension of every tensor is contiguous; ``plan`` is that of ``items`` for these sizes.

    Args:
        given: tiles; None takes those of ``tiles``.
    """
    (B, H, N, D), (G, M), DV = query.shape, key.shape[1:3], value.shape[3]
    out, lse = empty_results(query, DV)
    if not plan.covers_q:
        out.zero_()
        lse.fill_(float("-inf"))
    if out.numel() == 0:
        return out, lse
    block, chosen = layout.block, given or tiles(FORWARD, layout.block, D, DV, query.dtype, query.device)
    if ramp is not None:  # which needs registers, too
        chosen = chosen._replace(registers=0)
    part, part_lse = _parts(query, B * H * plan.q_slots, block, padded(DV), True)
    tensors = (
        query, key, value, _or(segments_q, query), _or(segments_k, query), layout.heads, plan.q_items, plan.columns,
        plan.masks, layout.bits, _or(layout.order_q, query), _or(layout.order_k, query), _or(ramp, query), out, lse,
        part, part_lse,
    )  # fmt: skip
    numbers = (
        B * H, H, G, N, M, D, DV, plan.q_items.shape[1], plan.q_slots, *_places(layout),
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *out.stride()[:3],
    )  # fmt: skip
    settings = _settings(query, layout, D, DV, segments_q, plan.q_slots, query.dtype, ramp)
    _run(_forward_kernel, B * H * plan.q_items.shape[1], tensors, scale * math.log2(math.e), numbers, settings, chosen)
    if plan.q_slots:
        _merge(part, part_lse, layout.heads, plan.q_merges, layout, layout.order_q, out, lse, plan.q_slots)
    return out, lse


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segments_q: Tensor | None,
    segments_k: Tensor | None,
    layout: Any,
    plan: Plan,
    scale: float,
    ramp: Tensor | None = None,
    given: tuple[Tiles, Tiles] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return ``naive.gradients``; arguments as of ``forward``.

    Args:
        given: tiles of the gradient of queries, and of that of keys and values; None takes those of ``tiles``.
    """
    (B, _, _, D), (G, M), DV = query.shape, key.shape[1:3], value.shape[3]
    of_q, of_k = given or (tiles(d, layout.block, D, DV, query.dtype, query.device) for d in (QUERIES, KEYS))
    grad_query, grad_key, grad_value = (each.new_empty(each.shape) for each in (query, key, value))
    P = plan.key_heads
    of_key, of_value = grad_key, grad_value
    if P != G:  # summed over the heads of a group afterwards
        of_key, of_value = (query.new_empty((B, P, M, size), dtype=torch.float32) for size in (D, DV))
    if not plan.covers_q or out.numel() == 0:
        grad_query.zero_()
    if not plan.covers_k or out.numel() == 0:
        of_key.zero_(), of_value.zero_()
    if out.numel() == 0:
        return grad_query, grad_key.zero_(), grad_value.zero_(), None if ramp is None else torch.zeros_like(ramp)
    delta = _delta(out, grad_out, lse, grad_lse)
    grad_ramp = _query_gradient(
        grad_query, grad_out, query, key, value, lse, delta, segments_q, segments_k, layout, plan, scale, ramp, of_q
    )  # fmt: skip
    _key_gradients(
        of_key, of_value, grad_out, query, key, value, lse, delta, segments_q, segments_k, layout, plan, scale, ramp,
        of_k,
    )  # fmt: skip
    if P != G:
        grad_key, grad_value = (each.unflatten(1, (G, P // G)).sum(2).to(key.dtype) for each in (of_key, of_value))
    return grad_query, grad_key, grad_value, grad_ramp


def empty_results(query: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Return room for out and lse: the heads of a token lie together, as a projection reads them."""
    B, H, N, _ = query.shape
    out = query.new_empty((B, N, H, channels)).transpose(1, 2)
    return out, query.new_empty((B, H, N), dtype=torch.float32)


def _query_gradient(
    grad_query: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor, delta: Tensor,
    segments_q: Tensor | None, segments_k: Tensor | None, layout: Any, plan: Plan, scale: float,
    ramp: Tensor | None, chosen: Tiles,
) -> Tensor | None:  # fmt: skip
    """Fill the gradient of queries, and return that of ``ramp``."""
    (B, H, N, D), (G, M), DV = query.shape, key.shape[1:3], value.shape[3]
    of_reach = None if ramp is None else ramp.new_empty(B, H, plan.q_items.shape[1])
    (part,) = _parts(query, B * H * plan.q_slots, layout.block, padded(D))
    tensors = (
        query, key, value, _or(segments_q, query), _or(segments_k, query), layout.heads, plan.q_items, plan.columns,
        plan.masks, layout.bits, _or(layout.order_q, query), _or(layout.order_k, query), _or(ramp, query), grad_out,
        lse, delta, grad_query, _or(of_reach, query), part,
    )  # fmt: skip
    numbers = (
        B * H, H, G, N, M, D, DV, plan.q_items.shape[1], plan.q_slots, *_places(layout), *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *grad_query.stride()[:3],
    )  # fmt: skip
    settings = _settings(query, layout, D, DV, segments_q, plan.q_slots, grad_query.dtype, ramp)
    _run(_query_kernel, B * H * plan.q_items.shape[1], tensors, scale, numbers, settings, chosen)
    if plan.q_slots:
        _merge(part, None, layout.heads, plan.q_merges, layout, layout.order_q, grad_query, None, plan.q_slots)
    if ramp is None or of_reach is None:
        return None
    grad_ramp = torch.zeros_like(ramp)
    grad_ramp[:, 0] = of_reach.sum((0, 2)) * ramp[:, 1]
    return grad_ramp


def _key_gradients(
    grad_key: Tensor, grad_value: Tensor, grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, lse: Tensor,
    delta: Tensor, segments_q: Tensor | None, segments_k: Tensor | None, layout: Any, plan: Plan, scale: float,
    ramp: Tensor | None, chosen: Tiles,
) -> None:  # fmt: skip
    (B, H, N, D), (G, M), DV, P = query.shape, key.shape[1:3], value.shape[3], plan.key_heads
    part_k, part_v = _parts(query, B * P * plan.k_slots, layout.block, padded(D), sizes=(padded(DV),))
    tensors = (
        query, key, value, _or(segments_q, query), _or(segments_k, query), layout.heads, plan.k_tables, plan.k_items,
        plan.rows, plan.key_masks, plan.key_bits, _or(layout.order_q, query), _or(layout.order_k, query),
        _or(ramp, query), grad_out, lse, delta, grad_key, grad_value, part_k, part_v,
    )  # fmt: skip
    numbers = (
        B * P, H, P, P // G, N, M, D, DV, plan.k_items.shape[1], plan.k_slots, *_places(layout), *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3], *grad_key.stride()[:3],
        *grad_value.stride()[:3],
    )  # fmt: skip
    settings = _settings(query, layout, D, DV, segments_q, plan.k_slots, grad_key.dtype, ramp)
    _run(_key_kernel, B * P * plan.k_items.shape[1], tensors, scale, numbers, settings, chosen)
    if plan.k_slots:
        for part, target in ((part_k, grad_key), (part_v, grad_value)):
            _merge(part, None, plan.k_tables, plan.k_merges, layout, layout.order_k, target, None, plan.k_slots)


def _delta(out: Tensor, grad_out: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """Return ``rowsum(dO O) - dlse``: float32 ``[B, H, N]``."""
    B, H, N, DV = out.shape
    delta = torch.empty_like(lse)
    strides = (0, 0, 0) if grad_lse is None else grad_lse.stride()
    numbers = (H, N, DV, *out.stride()[:3], *grad_out.stride()[:3], *strides)
    constants = {"ROWS": SUMMED, "BLOCK_DV": padded(DV), "HAS_LSE": grad_lse is not None}
    tensors = (out, grad_out, lse, _or(grad_lse, lse), delta)
    key = (out.dtype, None if grad_lse is None else grad_lse.dtype, *_kinds(numbers), *constants.values())
    _start(_delta_kernel, triton.cdiv(N, SUMMED) * B * H, tensors, numbers, constants, Tiles(0, 4, 1), key)
    return delta


def _merge(
    part: Tensor, part_lse: Tensor | None, tables: Tensor, merges: Tensor, layout: Any, order: Tensor | None,
    out: Tensor, lse: Tensor | None, slots: int,
) -> None:  # fmt: skip
    """Merge the pieces of ``part`` into ``out`` ``[B, P, N, size]``: see ``_merge_kernel``."""
    B, P, N, size = out.shape
    rows, count = min(MERGED, layout.block), merges.shape[1]
    places = 0 if order is None or order.shape[0] == 1 else order.shape[1]
    constants = {
        "BLOCK": layout.block, "ROWS": rows, "BLOCK_DV": padded(size), "HAS_ORDER": order is not None,
        "WEIGHTED": lse is not None,
    }  # fmt: skip
    numbers = (B * P, P, layout.heads.shape[0] // P, N, size, count, slots, places, *out.stride()[:3])
    tensors = (part, _or(part_lse, part), tables, merges, layout.heads, _or(order, tables), out, _or(lse, part))
    key = (out.dtype, *_kinds(numbers), *constants.values())
    _start(_merge_kernel, B * P * count * (layout.block // rows), tensors, numbers, constants, Tiles(0, 4, 1), key)


def _parts(
    like: Tensor, slots: int, block: int, size: int, logs: bool = False, sizes: tuple[int, ...] = ()
) -> list[Tensor]:
    """Return room for partial results: ``[slots, block, size]`` for each size and, with logs, ``[slots, block]``."""
    shapes = [(slots, block, each) for each in (size, *sizes)] + ([(slots, block)] if logs else [])
    return [torch.empty(shape, dtype=torch.float32, device=like.device) if slots else like for shape in shapes]


def _settings(
    query: Tensor, layout: Any, D: int, DV: int, segments: Tensor | None, slots: int, result: torch.dtype,
    ramp: Tensor | None,
) -> tuple:  # fmt: skip
    """Return what the constants of a launch follow from, besides its tiles: see ``_compiled``."""
    orders = layout.order_q is not None, layout.order_k is not None
    return query.dtype, result, layout.block, D, DV, segments is not None, *orders, slots > 0, ramp is not None


def _places(layout: Any) -> tuple[int, int]:
    """Return the distance between the orders of two head layouts, 0 if they have one order."""
    orders = layout.order_q, layout.order_k
    first, second = (0 if o is None or o.shape[0] == 1 else o.shape[1] for o in orders)
    return first, second


def _run(
    kernel: Any, programs: int, tensors: tuple, scale: float, numbers: tuple, settings: tuple, chosen: Tiles
) -> None:  # fmt: skip
    constants, key = _compiled(kernel, numbers, settings, chosen)
    _start(kernel, programs, tensors, (scale, *numbers), constants, chosen, key)


@lru_cache(maxsize=1024)
def _compiled(kernel: Any, numbers: tuple, settings: tuple, chosen: Tiles) -> tuple[dict[str, Any], int]:
    """Return the constants of a launch, and a number that calls of the same code share.

    A layer is called with the same shapes each time: with this the host's work is a look-up.
    """
    dtype, _, block, D, DV, *flags = settings
    names = ("HAS_SEGMENTS", "HAS_ORDER_Q", "HAS_ORDER_K", "HAS_SLOTS", "HAS_RAMP")
    constants = {
        "BLOCK": block, "STEP": chosen.step, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV), "FULL_D": padded(D) == D,
        "FULL_DV": padded(DV) == DV, **dict(zip(names, flags, strict=True)),
        "MATH": compute_constants(dtype, kernel)["MATH"],
    }  # fmt: skip
    code = (id(kernel), _kinds(numbers), settings, chosen)
    return constants, _CODES.setdefault(code, len(_CODES))


_CODES: dict[tuple, int] = {}


def _start(
    kernel: Any, programs: int, tensors: tuple, numbers: tuple, constants: dict[str, Any], chosen: Tiles, key: Any
) -> None:  # fmt: skip
    if not programs:
        return
    aligned = True if is_aligned(*tensors) else tuple(is_aligned(each) for each in tensors)
    launch(
        kernel, (programs, 1, 1), (*tensors, *numbers), constants, num_warps=chosen.warps, num_stages=chosen.stages,
        registers=chosen.registers, key=(key, aligned, *chosen),
    )  # fmt: skip


def _kinds(numbers: tuple) -> tuple[int, ...]:
    """Return what Triton specializes of integers: 1, multiples of 16, and whether they fit in 32 bits."""
    return tuple(1 if n == 1 else (16 if n % 16 == 0 else 2) + (n >= 1 << 31) for n in numbers)


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor, or another in place of none."""
    return other if tensor is None else tensor
