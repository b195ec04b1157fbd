"""LSH attention on a CPU by PyTorch's flash kernel: no scores are stored, also in training.

Rounds are merged by their log-sum-exp. The backward sorts once more, and gives each round the log-sum-exp of all, so
that each adds its part of the gradients.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .lsh_cuts import LshCut, beside, sorted_rounds, summed_from_beside
from .lsh_places import LshScheme

LSH_FLASH: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", None)
LSH_FLASH_BACKWARD: Any = getattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu_backward", None)
HIDDEN = -1e9  # score of what is not seen
SELF = -1e5  # score of a token with itself: it counts only where there is nothing else
AT_ONCE = 2**21  # scores whose mask is held
DTYPES = torch.float64, torch.float32, torch.bfloat16


def has_flash(query: Tensor, value: Tensor) -> bool:
    """Return True if ``flash_rounds`` computes these tensors."""
    alike = query.dtype == value.dtype in DTYPES and query.shape[-1] == value.shape[-1]
    return query.device.type == "cpu" and LSH_FLASH is not None and LSH_FLASH_BACKWARD is not None and alike


def flash_rounds(query: Tensor, key: Tensor, value: Tensor, buckets: Tensor, scheme: LshScheme, causal: bool) -> Tensor:
    """Compute schemes in which a key counts once, differentiable once.

    Args:
        query, key: ``[R, H, n, D]``.
        value: ``[R, H, n, D]``.
        buckets: int64 ``[R, H, rounds, n]``, those of padding behind all others.
        scheme: says which pairs are computed.
        causal: a token sees no later ones.

    Returns:
        ``[R, H, n, D]``; that of padding means nothing.
    """
    return _FlashRounds.apply(query, key, value, buckets, scheme, causal)  # type: ignore[no-any-return]


class _FlashRounds(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, buckets: Tensor, scheme: LshScheme, causal: bool
    ) -> Tensor:
        sides = scheme.beside(causal)
        outs, sums = [], []
        for some, *parts in _rows_at_once(scheme, causal, buckets, query, key, value):
            out: Any = None
            total: Any = None
            for cut, mask in _flash_passes(some, scheme, causal, query.dtype):
                q, k, v = (cut.take(part) for part in parts)
                given = (_kernel_rows(q), _kernel_rows(beside(k, sides)), _kernel_rows(beside(v, sides)))
                one, own = LSH_FLASH(*given, 0.0, False, attn_mask=mask, scale=1.0)
                one = cut.put(one.reshape(q.shape)).to(own.dtype)
                own = cut.put(own.reshape(*q.shape[:-1], 1))
                if out is None:
                    out, total = one, own
                else:
                    both = torch.logaddexp(total, own)
                    out = out * (total - both).exp() + one * (own - both).exp()
                    total = both
            outs.append(out)
            sums.append(total)
        out, total = torch.cat(outs).to(query.dtype).view_as(query), torch.cat(sums)
        ctx.save_for_backward(query, key, value, buckets, out, total)
        ctx.scheme, ctx.causal = scheme, causal
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        query, key, value, buckets, out, total = ctx.saved_tensors
        scheme, causal = ctx.scheme, ctx.causal
        sides = scheme.beside(causal)
        total = total.view(*query.shape[:-1], 1)
        found: list[list[Tensor]] = [[], [], []]
        for some, *parts in _rows_at_once(scheme, causal, buckets, query, key, value, grad, out, total):
            sums: list[Any] = [0, 0, 0]
            for cut, mask in _flash_passes(some, scheme, causal, query.dtype):
                q, k, v, g, o, t = (cut.take(part) for part in parts)
                given = (
                    _kernel_rows(q),
                    _kernel_rows(beside(k, sides)),
                    _kernel_rows(beside(v, sides)),
                    _kernel_rows(o),
                )
                logs = t.flatten(0, 2)[:, None, :, 0]
                of_query, *others = LSH_FLASH_BACKWARD(
                    _kernel_rows(g), *given, logs, 0.0, False, attn_mask=mask, scale=1.0
                )
                parts_of = [of_query.reshape(q.shape)]
                parts_of += [summed_from_beside(each.reshape(*q.shape[:3], -1, q.shape[-1]), sides) for each in others]
                sums = [before + cut.put(part) for before, part in zip(sums, parts_of, strict=True)]
            for each, part in zip(found, sums, strict=True):
                each.append(part)
        return *(torch.cat(each).view_as(query) for each in found), None, None, None


def _rows_at_once(scheme: LshScheme, causal: bool, buckets: Tensor, *parts: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield rows of buckets ``[G, 1, rounds, n]`` and tensors ``[G, 1, n, D]``, as many as are computed at once."""
    width = (sum(scheme.beside(causal)) + 1) * scheme.chunk
    count = max(1, AT_ONCE // (buckets.shape[-1] * width))
    flat = [part.flatten(0, 1)[:, None] for part in (buckets, *parts)]
    yield from zip(*(part.split(count) for part in flat), strict=True)


def _flash_passes(
    buckets: Tensor, scheme: LshScheme, causal: bool, dtype: torch.dtype
) -> Iterator[tuple[LshCut, Tensor]]:
    """Yield for each round how tokens are cut, and what is added to scores ``[G * C, 1, m, W]``."""
    for cut, seen, own in sorted_rounds(buckets, scheme, causal):
        mask = seen.logical_not_().to(dtype).mul_(HIDDEN)
        if own is not None:
            mask.masked_fill_(own, SELF)
        yield cut, mask.flatten(0, 2)[:, None]


def _kernel_rows(part: Tensor) -> Tensor:
    """Return ``[G, 1, C, m, D]`` as ``[G * C, 1, m, D]``, as the kernel takes it."""
    return part.flatten(0, 2)[:, None].contiguous()
