"""The operator ``torch.ops.hf_optim.decode_attention`` (see ``naive``). Importing this module registers it.

On a CUDA device it runs the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). It has a fake implementation, and no gradient: it is for decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from . import naive
from .naive import mask_ranges as mask_ranges

# New tokens of a call: decoding, speculation, and small chunks of a prefill.
MOST_TOKENS = 16
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unsupported(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> str | None:
    """Return why the operator does not take these tensors; None if it does."""
    if query.dtype not in DTYPES or key.dtype != query.dtype or value.dtype != query.dtype:
        return f"{query.dtype} queries and {key.dtype} keys"
    if query.shape[1] % key.shape[1]:
        return f"{query.shape[1]} query heads do not share {key.shape[1]} key heads evenly"
    if query.shape[2] > MOST_TOKENS:
        return f"{query.shape[2]} new tokens"
    if max(query.shape[3], value.shape[3]) > 256:
        return f"heads of {query.shape[3]}"
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        return "a mask that differs between heads, or is not bool"
    return None


@torch.library.custom_op("hf_optim::decode_attention", mutates_args=())
def decode_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    ranges: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return the attention ``[B, Q, H, Dv]`` of ``query`` to a cache; arguments as of ``naive.decode_attention``.

    A caller that has one mask for many layers computes its ``mask_ranges`` once; without them they are computed here.
    """
    if not can_run_triton(query):
        return naive.decode_attention(query, key, value, mask, ranges, sinks, scale, softcap)
    from . import launch

    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    if mask is not None:
        mask = mask if mask.stride(-1) == 1 else mask.contiguous()
        ranges = mask_ranges(mask) if ranges is None else ranges
    ranges = ranges if ranges is None else ranges.contiguous()
    return launch.decode_attention(query, key, value, mask, ranges, sinks, scale, softcap)


@decode_attention.register_fake
def _(query, key, value, mask, ranges, sinks, scale, softcap) -> Tensor:
    B, H, Q, _ = query.shape
    return query.new_empty((B, Q, H, value.shape[3]))
