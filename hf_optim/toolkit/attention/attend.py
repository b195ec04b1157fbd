"""Attention under patterns: the same result on every way to compute it, which is chosen by device and length.

- The lists of blocks, by a kernel on a GPU where one is installed, or in plain PyTorch: time follows the pattern.
- One dense product with a mask: for short rows, for patterns that see most, and while a cache is read.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .blocked import DistanceBias, blocked_attention, merge
from .dense_attention import dense_product
from .device_constants import constant_on
from .flash_cpu import Source, flash_attention, flash_on_cpu
from .head_patterns import HeadPatterns, as_bias, seen_mask, weight_bias
from .layout import BLOCK, Layout, layouts
from .pattern import kept_tensors
from .rows import Apart, Rows

KERNEL = "hf_optim_kernels.sparse_attention.op"  # where it is installed
SHORTEST = 256  # rows below are computed densely
LARGEST_SHARE = 0.5  # of the blocks; patterns that see more are computed densely


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: HeadPatterns,
    scale: float,
    rows: Rows | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    way: str = "auto",
    bias: DistanceBias | None = None,
) -> Tensor:
    """Compute softmax attention over the keys that the patterns let each query see.

    Args:
        query: ``[B, H, N, D]``.
        key, value: ``[B, G, M, D]``; M = N, or more if the first keys come from a cache.
        heads: the patterns of the H heads.
        scale: of the scores.
        rows: padding and documents; None if each row is one whole document. Positions count from its first token.
        mask: bool (True: visible) or additive, broadcast to ``[B, H, N, M]``: intersected with the patterns.
        dropout: share of the attention weights that is dropped.
        way: ``auto``, ``blocks`` or ``dense``.
        bias: what is added to scores by the distance of positions; then all is computed densely.

    Returns:
        ``[B, H, N, D]``; zero for a query that sees nothing (padding).
    """
    count, length = query.shape[2], key.shape[2]
    query, key, value = alike(query, key, value)
    if bias is not None:
        added = bias_of_pairs(bias, count, length, rows, query.device)
        mask = added if mask is None else added + as_bias(mask[..., :length], added.dtype)
    if mask is not None or count != length:
        return _dense(query, key, value, heads, scale, rows, mask, dropout)
    if rows is not None and not heads.is_full(length) and must_move(rows, heads):
        return _each_document(query, key, value, heads, scale, rows, dropout, way)
    lists = lists_for(query, heads, length, way)
    if lists is None:
        return _dense(query, key, value, heads, scale, rows, None, dropout)
    segments = None if rows is None else rows.segments
    return attend_lists(query, [Source(key, value, lists, segments)], scale, segments, dropout)


def attend_lists(
    query: Tensor, sources: Sequence[Source], scale: float, segments: Tensor | None, dropout: float
) -> Tensor:
    """Compute the attention over the union of layouts, by the kernel if it is installed for the device.

    Arguments and results as in ``flash_attention``; ``dropout`` as in ``attend``.
    """
    simple = not any(part.shift is not None for source in sources for part in source.lists)
    if simple and not dropout and all(flash_on_cpu(query, each.key, each.value) for each in sources):
        return flash_attention(query, sources, scale, segments)
    return merge([part for each in sources for part in parts_of(query, each, scale, segments, dropout)])


def parts_of(
    query: Tensor, source: Source, scale: float, segments: Tensor | None, dropout: float
) -> list[tuple[Tensor, Tensor]]:
    """Compute the attention over each layout of a source, by the kernel if it is installed for the device.

    Returns for each the output ``[B, H, N, D]`` and the log-sum-exp ``[B, H, N]``, for ``merge``; differentiable.
    """
    extra = {"dropout": dropout} if dropout else {}
    kernel = None if dropout else installed_kernel(query, source.key, source.value, scale)
    product: Callable[..., Any] = kernel or blocked_attention
    parts = []
    for part in source.lists:
        out, sums = product(query, source.key, source.value, part, scale, segments, source.segments, **extra)
        if part.shift is not None:  # pairs that count several times have a larger sum of exponentials
            sums = sums + constant_on(part.shift, sums.device, sums.dtype)[:, None]
        parts.append((out, sums))
    return parts


def bias_of_pairs(bias: DistanceBias, count: int, length: int, rows: Rows | None, device: torch.device) -> Tensor:
    """Return what is added to the scores of the last ``count`` of ``length`` tokens, ``[B or 1, H, count, length]``."""
    if rows is None:
        key = torch.arange(length, device=device)[None]
        query = key[:, length - count :]
    else:
        start = rows.offset if count != length else 0
        key = rows.positions()
        query = key[:, start : start + count]
    return bias(query[:, :, None] - key[:, None, :], None).transpose(0, 1)


def alike(*parts: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors in one dtype: that of autocast if they differ under it, as PyTorch's own attention does."""
    device = parts[0].device.type
    if len({part.dtype for part in parts}) > 1 and torch.is_autocast_enabled(device):
        return tuple(part.to(torch.get_autocast_dtype(device)) for part in parts)
    return parts


def must_move(rows: Rows, heads: HeadPatterns) -> bool:
    """Return True if the patterns would count positions from the wrong place where the tokens are."""
    if rows.holes or ((rows.left or rows.packed) and not heads.moves_along):
        return True
    return heads.reads_length and (rows.packed or not rows.whole)


def _each_document(
    query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float, rows: Rows, dropout: float, way: str
) -> Tensor:
    """Compute each document in a row of its own, and those of different lengths apart if the patterns read lengths."""
    apart = Apart.of(rows)
    q, k, v = (apart.take(part) for part in (query, key, value))
    segments, lengths = apart.segments(), apart.lengths()
    if not heads.reads_length:
        inner = Rows(segments, whole=bool((lengths == lengths[0]).all()))
        return apart.put(attend(q, k, v, heads, scale, inner, None, dropout, way), len(query))
    out = q.new_zeros(*q.shape[:3], v.shape[-1])
    steps = (lengths + heads.length_step - 1) // heads.length_step
    for count in steps.unique().tolist():
        # Rows of one number of steps see the same, so they are computed together, at the length of all their steps.
        some = (steps == count).nonzero()[:, 0]
        length = count * heads.length_step
        one, two, three = (long_enough(x[some], length) for x in (q, k, v))
        whole = bool((lengths[some] == length).all())
        own = None if whole else Rows(long_enough(segments[some], length, -1))
        part = attend(one, two, three, heads, scale, own, None, dropout, way)
        out = out.index_copy(0, some, long_enough(part, out.shape[2]))
    return apart.put(out, len(query))


def long_enough(part: Tensor, length: int, filler: int = 0) -> Tensor:
    """Return ``[B, H, N, D]`` or ``[B, N]`` with ``length`` tokens: cut, or padded at the end."""
    if part.dim() == 2:
        return functional.pad(part[:, :length], (0, max(0, length - part.shape[1])), value=filler)
    return functional.pad(part[:, :, :length], (0, 0, 0, max(0, length - part.shape[2])))


def lists_for(query: Tensor, heads: HeadPatterns, length: int, way: str) -> tuple[Layout, ...] | None:
    """Return the lists that attention under ``heads`` is computed by; None to compute densely."""
    if way == "dense" or heads.is_full(length) or (way == "auto" and length < SHORTEST):
        return None
    found, share = _lists(heads, length, query.device)
    return None if way == "auto" and share > LARGEST_SHARE else found


@kept_tensors(256)
def _lists(heads: HeadPatterns, length: int, device: torch.device) -> tuple[tuple[Layout, ...], float]:
    """Return the lists of blocks, and their share of those that a dense product with a mask computes, also behind the
    query.
    """
    found = layouts(heads.patterns, heads.heads, length, BLOCK, device)
    return found, sum(part.entries for part in found) / (len(heads.patterns) * (-(-length // BLOCK)) ** 2)


@lru_cache(maxsize=1)
def _installed() -> Any:
    try:
        return importlib.import_module(KERNEL)
    except ImportError:
        return None


def installed_kernel(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Any:
    """Return the installed kernel if it computes on the device of these tensors, in their dtype and sizes."""
    if query.device.type != "cuda":
        return None
    module = _installed()
    if module is None or not scale > 0 or module.unsupported(query, key, value) is not None:
        return None
    return module.sparse_attention


def _dense(
    query: Tensor, key: Tensor, value: Tensor, heads: HeadPatterns, scale: float,
    rows: Rows | None, mask: Tensor | None, dropout: float,
) -> Tensor:  # fmt: skip
    count, length = query.shape[2], key.shape[2]
    plain = rows is None and mask is None and count == length and heads.is_full(length)
    if plain:
        causal = heads.causal and count > 1
        return dense_product(query, key, value, None, dropout, causal, scale)
    seen = seen_mask(heads, count, length, rows, query.device)
    weights = weight_bias(heads, count, length, rows, query)
    if weights is not None:
        mask = weights if mask is None else weights + as_bias(mask[..., :length], query.dtype)
    return masked_attention(query, key, value, seen, mask, scale, dropout)


def masked_attention(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Compute one dense product over the pairs that ``seen`` (bool) and ``mask`` (bool or additive) both allow.

    Returns ``[B, H, N, D]``, zero for a query without keys. Other arguments as in ``attend``.
    """
    bias = None
    if mask is not None:
        mask = mask[..., : key.shape[2]]
        seen = seen & mask if mask.dtype == torch.bool else seen & (mask > torch.finfo(mask.dtype).min)
        bias = None if mask.dtype == torch.bool else mask
    empty = ~seen.any(-1, keepdim=True)
    seen = seen | empty  # no row without keys: its softmax would be undefined
    if bias is not None:
        bias = bias.masked_fill(~seen, -torch.inf).masked_fill(empty, 0).to(query.dtype)
    out = dense_product(query, key, value, seen if bias is None else bias, dropout, scale=scale)
    return out.masked_fill(empty, 0)
