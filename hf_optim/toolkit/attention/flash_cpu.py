"""Attention over lists of blocks on a CPU, by PyTorch's flash kernel for CPUs: no scores are stored, also in training.

Blocks of keys are gathered a few at a time, so that they stay in the cache of the processor, and query blocks that read
equally masked blocks share one mask. Passes are merged by their log-sum-exp; the kernel's backward takes the
log-sum-exp of the whole, so each pass adds its part of the gradients.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .flash_plan import Part, chunks, parts_of_passes, placed
from .layout import Layout

FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)


def flash_on_cpu(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return True if ``flash_attention`` computes these tensors."""
    alike = query.dtype == key.dtype == value.dtype and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and FLASH is not None and FLASH_BACKWARD is not None and alike


@dataclass(eq=False)
class Source:
    """Keys that queries see.

    Attributes:
        key, value: ``[B, G, M, D]``, G divides the number of query heads.
        lists: the layouts of the passes.
        segments: int ``[B, M]``, or None.
    """

    key: Tensor
    value: Tensor
    lists: Sequence[Layout]
    segments: Tensor | None


def flash_attention(query: Tensor, sources: Sequence[Source], scale: float, segments: Tensor | None = None) -> Tensor:
    """Compute the attention over the union of disjoint sets of keys, and of passes over each; differentiable once.

    Args:
        query: ``[B, H, N, D]``.
        sources: the keys, of the dtype of the query.
        scale: of the scores.
        segments: int ``[B, N]``: a query sees a key if the segments of both are equal and not negative.

    Returns:
        ``[B, H, N, D]`` in the dtype of the query, zero for a query without keys.
    """
    tensors = [part for source in sources for part in (source.key, source.value)]
    lists = [(source.lists, source.segments) for source in sources]
    return _Flash.apply(query, lists, scale, segments, *tensors)  # type: ignore[no-any-return]


class _Flash(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, lists: Any, scale: float, segments: Tensor | None, *tensors: Tensor) -> Tensor:
        parts = [
            _flash_forward(query, tensors[2 * index], tensors[2 * index + 1], each, scale, segments, of_keys)
            for index, (each, of_keys) in enumerate(lists)
        ]
        out, sums = parts[0]
        for more, of_more in parts[1:]:
            out, sums = _merged(out.to(sums.dtype), sums, more, of_more)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, out, sums, *tensors)
        ctx.lists, ctx.scale, ctx.segments = lists, scale, segments
        return out.transpose(1, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, out, sums, *tensors = ctx.saved_tensors
        of_query, found = torch.zeros_like(query), []
        for index, (lists, of_keys) in enumerate(ctx.lists):
            key, value = tensors[2 * index : 2 * index + 2]
            one, *others = _flash_backward(grad, query, key, value, out, sums, lists, ctx.scale, ctx.segments, of_keys)
            of_query = of_query + one
            found += others
        return of_query, None, None, None, *found


def _flash_forward(
    query: Tensor, key: Tensor, value: Tensor, lists: Sequence[Layout], scale: float,
    segments: Tensor | None, of_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return the output ``[B, N, H, D]`` and the log-sum-exp ``[B, N, H]``."""
    batch, heads, tokens, size = query.shape
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    merged = len(lists) > 1
    out = query.new_zeros(batch, tokens, heads, size, dtype=accurate if merged else query.dtype)
    sums = torch.full((batch, tokens, heads), -torch.inf, dtype=accurate)
    first = True
    for parts in parts_of_passes(lists, query, key):
        for part in parts:
            found, lse = _forward_part(query, key, value, part, scale, segments, of_keys)
            if part.heads is None and first and not merged:
                return found, lse
            old_out, old = (x if part.heads is None else x.index_select(2, part.heads) for x in (out, sums))
            if not first:
                found, lse = _merged(old_out, old, found, lse)
            if part.heads is None:
                out, sums = found.to(out.dtype), lse
            else:
                out.index_copy_(2, part.heads, found.to(out.dtype))
                sums.index_copy_(2, part.heads, lse)
        first = False
    return out.to(query.dtype), sums


def _merged(out: Tensor, sums: Tensor, other: Tensor, more: Tensor) -> tuple[Tensor, Tensor]:
    total = torch.logaddexp(sums, more)
    base = total.masked_fill(torch.isneginf(total), 0)
    out = out * torch.exp(sums - base)[..., None]
    return out.addcmul_(other.to(out.dtype), torch.exp(more - base)[..., None]), total


def _forward_part(
    query: Tensor, key: Tensor, value: Tensor, part: Part, scale: float,
    segments: Tensor | None, of_keys: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan, batch = part.plan, len(query)
    q = placed(query, part.heads, plan.order_q, plan.blocks_q, part.layout.block)
    k, v = (placed(x, part.key_heads, plan.order_k, plan.blocks_k, part.layout.block) for x in (key, value))
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    sums = torch.full(q.shape[:3], -torch.inf, dtype=torch.float64 if q.dtype == torch.float64 else torch.float32)
    for rows, columns, mask, empty in chunks(part, batch, k, segments, of_keys):
        taken = _folded(q.index_select(0, rows), part.fold)
        found, lse = FLASH(taken, _block_rows(k, columns), _block_rows(v, columns), attn_mask=mask, scale=scale)
        found, lse = _unfolded(found, part.fold), _unfolded(lse[..., None], part.fold)[..., 0]
        if empty is not None:
            found = found.masked_fill(empty[..., None, None], 0)
            lse = lse.masked_fill(empty[..., None], -torch.inf)
        out.index_copy_(0, rows, found)
        sums.index_copy_(0, rows, lse)
    tokens = query.shape[2]
    return _back(out, plan.place_q, batch, tokens, 0), _back(sums, plan.place_q, batch, tokens, -torch.inf)


def _flash_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, sums: Tensor,
    lists: Sequence[Layout], scale: float, segments: Tensor | None, of_keys: Tensor | None,
) -> list[Tensor]:  # fmt: skip
    batch, accurate = len(query), sums.dtype
    sums = sums.masked_fill(torch.isneginf(sums), torch.inf).transpose(1, 2)  # weights of 0
    out = out.transpose(1, 2)
    totals = [torch.zeros(x.transpose(1, 2).shape, dtype=accurate) for x in (query, key, value)]
    for parts in parts_of_passes(lists, query, key):
        for part in parts:
            plan, block = part.plan, part.layout.block
            at_query = part.heads, plan.order_q, plan.blocks_q, block
            at_key = part.key_heads, plan.order_k, plan.blocks_k, block
            q, g, o = (placed(x, *at_query) for x in (query, grad, out))
            s = placed(sums[..., None], *at_query, empty=torch.inf)
            k, v = (placed(x, *at_key) for x in (key, value))
            into = [torch.zeros(x.shape, dtype=accurate) for x in (q, k, v)]
            for rows, columns, mask, _ in chunks(part, batch, k, segments, of_keys):
                taken = [_folded(x.index_select(0, rows), part.fold) for x in (q, g, o, s)]
                keys, values = _block_rows(k, columns), _block_rows(v, columns)
                found = FLASH_BACKWARD(
                    taken[1],
                    taken[0],
                    keys,
                    values,
                    taken[2],
                    taken[3][..., 0],
                    0.0,
                    False,
                    attn_mask=mask,
                    scale=scale,
                )
                into[0].index_copy_(0, rows, _unfolded(found[0], part.fold).to(accurate))
                for total, one in zip(into[1:], found[1:], strict=True):
                    blocks = one.transpose(1, 2).reshape(-1, *total.shape[1:])
                    total.index_add_(0, columns.flatten(), blocks.to(accurate))
            places = (plan.order_q, part.heads), (plan.order_k, part.key_heads), (plan.order_k, part.key_heads)
            for total, one, (order, heads) in zip(totals, into, places, strict=True):
                _add(total, one.view(batch, -1, *one.shape[2:]), order, heads)
    return [total.to(x.dtype).transpose(1, 2) for total, x in zip(totals, (query, key, value), strict=True)]


def _add(total: Tensor, part: Tensor, order: Tensor | None, heads: Tensor | None) -> None:
    """Add ``[B, places, h, D]`` to ``[B, N, H, D]``."""
    if order is None:
        part = part[:, : total.shape[1]]
    else:
        real = order >= 0
        part = torch.zeros_like(total[:, :, : part.shape[2]]).index_copy_(1, order[real], part[:, real])
    if heads is None:
        total += part
    else:
        total.index_add_(2, heads, part)


def _back(part: Tensor, place: Tensor | None, batch: int, tokens: int, empty: float) -> Tensor:
    """Return ``[B * blocks, block, ...]`` as ``[B, N, ...]``; a token without a place has the value ``empty``."""
    part = part.reshape(batch, -1, *part.shape[2:])
    if place is None:
        return part[:, :tokens]
    found = part.index_select(1, place.clamp_min(0))
    if (place < 0).any():
        found[:, place < 0] = empty
    return found


def _block_rows(part: Tensor, columns: Tensor) -> Tensor:
    """Return the blocks ``[R, count]`` of ``[blocks, block, G, D]`` as ``[R, G, count * block, D]``."""
    found = part.index_select(0, columns.flatten())
    return found.view(len(columns), columns.shape[1] * part.shape[1], *part.shape[2:]).transpose(1, 2)


def _folded(part: Tensor, fold: int) -> Tensor:
    """Return ``[R, block, H, D]`` as ``[R, H / fold, fold * block, D]``."""
    if fold == 1:
        return part.transpose(1, 2)
    return part.unflatten(2, (-1, fold)).permute(0, 2, 3, 1, 4).flatten(2, 3)


def _unfolded(part: Tensor, fold: int) -> Tensor:
    """Return ``[R, H / fold, fold * block, D]`` as ``[R, block, H, D]``."""
    if fold == 1:
        return part.transpose(1, 2)
    return part.unflatten(2, (fold, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
