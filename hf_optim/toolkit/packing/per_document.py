"""Attention within each document of a packed row ``[total, H, D]``.

    out[i] = sum over j in the document of i, |i - j| <= reach, of  softmax_j(scale q_i k_j + bias_(i, j)) v_j

On a CPU, documents of equal length are neighbours and one call computes them: no padding, no gathers. On CUDA, half
precision runs in torch's variable-length flash attention, float32 in SDPA over jagged nested tensors, and a position
bias pads queries, keys and values around the product alone, as EffectiveTransformer does around every attention.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import Documents, equal_groups

try:  # CUDA only; older versions of torch have none
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None  # type: ignore[assignment]

HALF = (torch.float16, torch.bfloat16)


def attend_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    reach: int | None = None,
) -> Tensor:
    """Return attention within documents, ``[total, H, D]``.

    Args:
        query, key, value: ``[total, H, D]``.
        documents: of the packed row.
        scale: of the scores.
        dropout: share of the weights that is dropped.
        bias: added to the scores, ``[1, H, longest, longest]``, by places within a document.
        reach: how far a token sees on both sides; None: all of its document.
    """
    if not query.is_cuda:
        if torch.compiler.is_compiling():
            if dropout:
                return _uncompiled(query, key, value, documents, scale, dropout, bias, reach)
            return torch.ops.hf_optim.attend_groups(query, key, value, documents.cu, scale, bias, reach)
        return attend_groups(query, key, value, documents.lengths, scale, dropout, bias, reach)
    if bias is not None:
        return attend_padded(query, key, value, documents, scale, dropout, bias, reach)
    if query.dtype in HALF and not dropout and varlen_attn is not None:
        window = (-1, -1) if reach is None else (reach, reach)
        cu, longest = documents.cu, documents.longest
        found: Any = varlen_attn(query, key, value, cu, cu, longest, longest, scale=scale, window_size=window)
        return found
    if reach is not None and reach < documents.longest - 1:
        return attend_padded(query, key, value, documents, scale, dropout, None, reach)
    return attend_nested(query, key, value, documents, scale, dropout)


def attend_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...] | list[int],
    scale: float,
    dropout: float = 0.0,
    bias: Tensor | None = None,
    reach: int | None = None,
) -> Tensor:
    """Return attention within documents, one call for each run of documents of equal length. Arguments as above."""
    heads, width = query.shape[1:]
    recorded = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    out = None if recorded else torch.empty(value.shape, dtype=value.dtype, device=value.device)
    parts = []
    for begin, count, length in equal_groups(lengths):
        part = slice(begin, begin + count * length)
        q, k, v = (x[part].view(count, length, heads, width).transpose(1, 2) for x in (query, key, value))
        mask = _mask(length, bias, reach, query)
        got = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout, scale=scale).transpose(1, 2)
        if out is None:
            parts.append(got.reshape(count * length, heads, width))
        else:
            out[part].view(count, length, heads, width).copy_(got)
    return torch.cat(parts) if out is None else out


def _mask(length: int, bias: Tensor | None, reach: int | None, like: Tensor) -> Tensor | None:
    """Return what is added to the scores of a document of a length, ``[1, H or 1, length, length]``, or None."""
    mask = None if bias is None else bias[..., :length, :length].to(like.dtype)
    if reach is None or reach >= length - 1:
        return mask
    place = torch.arange(length, device=like.device)
    near = (place[:, None] - place).abs() <= reach
    return near[None, None] if mask is None else mask.masked_fill(~near, -math.inf)


def attend_padded(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    scale: float,
    dropout: float,
    bias: Tensor | None,
    reach: int | None,
) -> Tensor:
    """Return attention within documents that are padded to the longest for this product alone. Arguments as above."""
    longest, count = documents.longest, len(documents.lengths)
    heads, width = query.shape[1:]
    kept = documents.kept
    if "slots" not in kept:
        begins = documents.cu[:-1].long()
        lengths = documents.cu[1:].long() - begins
        document = torch.repeat_interleave(lengths, output_size=query.shape[0])
        place = torch.arange(query.shape[0], device=query.device) - begins[document]
        kept["slots"] = document * longest + place
        kept["known"] = torch.arange(longest, device=query.device) < lengths[:, None]
    slots = kept["slots"]
    name = f"mask {reach} {None if bias is None else id(bias)}"
    if name not in kept:
        seen = kept["known"][:, None, None, :]
        local = _mask(longest, bias, reach, query)
        if local is None:
            kept[name] = seen
        elif local.dtype == torch.bool:
            # A query behind the end of its document would see nothing at all: it sees itself.
            kept[name] = (seen & local) | torch.eye(longest, dtype=torch.bool, device=query.device)
        else:
            kept[name] = torch.where(seen, local, torch.finfo(query.dtype).min)
    shape = (count, longest, heads, width)

    def padded(x: Tensor) -> Tensor:
        return x.new_zeros(count * longest, heads, width).index_copy(0, slots, x).view(shape).transpose(1, 2)

    got = F.scaled_dot_product_attention(
        padded(query), padded(key), padded(value), attn_mask=kept[name], dropout_p=dropout, scale=scale
    )
    return got.transpose(1, 2).reshape(count * longest, heads, width).index_select(0, slots)


def attend_nested(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, dropout: float
) -> Tensor:
    """Return attention within documents by SDPA over jagged nested tensors. Arguments as above."""
    offsets = documents.cu.long()
    lengths = documents.lengths
    q, k, v = (
        torch.nested.nested_tensor_from_jagged(
            x, offsets, min_seqlen=min(lengths), max_seqlen=documents.longest
        ).transpose(1, 2)
        for x in (query, key, value)
    )
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale).transpose(1, 2).values()


@torch.compiler.disable
def _uncompiled(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, scale: float, dropout: float,
    bias: Tensor | None, reach: int | None,
) -> Tensor:  # fmt: skip
    return attend_groups(query, key, value, documents.lengths, scale, dropout, bias, reach)


# -- under torch.compile on a CPU: lengths are values of a tensor, so that none of them is compiled in -----------------
@torch.library.custom_op("hf_optim::attend_groups", mutates_args=())
def _compiled_groups(
    query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, bias: Tensor | None, reach: int | None
) -> Tensor:
    return attend_groups(query, key, value, cu.diff().tolist(), scale, 0.0, bias, reach)


@_compiled_groups.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, bias: Tensor | None, reach: int | None):
    return torch.empty(value.shape, dtype=value.dtype, device=value.device)


@torch.library.custom_op("hf_optim::attend_groups_backward", mutates_args=())
def _compiled_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, cu: Tensor, scale: float, bias: Tensor | None,
    reach: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    heads, width = query.shape[1:]
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (query, key, value)]
    of_bias = query.new_empty(0) if bias is None else torch.zeros_like(bias)
    for begin, count, length in equal_groups(cu.diff().tolist()):
        part = slice(begin, begin + count * length)
        shape = (count, length, heads, width)
        q, k, v, g = (x[part].view(shape).transpose(1, 2) for x in (query, key, value, gradient))
        scores = scale * (q @ k.transpose(-1, -2))
        mask = _mask(length, bias, reach, query)
        if mask is not None:
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
        weights = scores.softmax(-1)
        of_weights = g @ v.transpose(-1, -2)
        of_scores = weights * (of_weights - (of_weights * weights).sum(-1, keepdim=True))
        parts = (scale * of_scores @ k, scale * of_scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ g)
        for whole, made in zip(found, parts, strict=True):
            whole[part].view(shape).copy_(made.transpose(1, 2))
        if bias is not None:
            of_bias[..., :length, :length] += of_scores.sum(0, keepdim=True)
    return found[0], found[1], found[2], of_bias


@_compiled_backward.register_fake
def _(gradient, query, key, value, cu, scale, bias, reach):
    made = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (query, key, value)]
    last = query.new_empty(0) if bias is None else torch.empty(bias.shape, dtype=bias.dtype, device=bias.device)
    return made[0], made[1], made[2], last


def _keep(ctx, inputs, output) -> None:
    query, key, value, cu, scale, bias, reach = inputs
    ctx.save_for_backward(query, key, value, cu, *([] if bias is None else [bias]))
    ctx.scale, ctx.reach = scale, reach


def _differentiate(ctx, gradient):
    query, key, value, cu, *rest = ctx.saved_tensors
    bias = rest[0] if rest else None
    found = torch.ops.hf_optim.attend_groups_backward(
        gradient.contiguous(), query, key, value, cu, ctx.scale, bias, ctx.reach
    )
    return (*found[:3], None, None, found[3] if bias is not None else None, None)


_compiled_groups.register_autograd(_differentiate, setup_context=_keep)
