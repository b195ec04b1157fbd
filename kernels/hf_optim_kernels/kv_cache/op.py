"""The operators ``torch.ops.hf_optim.kv_append`` and ``kv_attend`` (see ``naive``). Importing this registers them.

On a CUDA device they run the Triton kernels, on a CPU the specification (or, under ``TRITON_INTERPRET=1``, the
interpreted kernels). They have fake implementations, and no gradient: they are for decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.support import can_run_triton
from ..decode_attention.op import DTYPES
from . import naive
from .format import Format, Store

# The most rows of a program: heads of a group times new tokens.
MOST_ROWS = 64


def unsupported(query: Tensor, heads: int, mask: Tensor | None) -> str | None:
    """Return why ``kv_attend`` does not take a query ``[B, H, Q, D]`` over ``heads`` key heads; None if it does."""
    if query.dtype not in DTYPES:
        return f"{query.dtype} queries"
    if query.shape[1] % heads:
        return f"{query.shape[1]} query heads do not share {heads} key heads evenly"
    if query.shape[1] // heads * query.shape[2] > MOST_ROWS:
        return f"{query.shape[2]} new tokens"
    if query.shape[3] > 256:
        return f"heads of {query.shape[3]}"
    if mask is not None and (mask.dtype != torch.bool or mask.ndim != 4 or mask.shape[1] != 1):
        return "a mask that differs between heads, or is not bool"
    return None


@torch.library.custom_op(
    "hf_optim::kv_append",
    mutates_args=(
        "state", "key_words", "key_scale", "key_zero", "value_words", "value_scale", "value_zero", "tail_keys",
        "tail_values",
    ),
)  # fmt: skip
def kv_append(
    key: Tensor, value: Tensor, state: Tensor, fmt: list[int], key_words: Tensor, key_scale: Tensor, key_zero: Tensor,
    value_words: Tensor, value_scale: Tensor, value_zero: Tensor, tail_keys: Tensor, tail_values: Tensor,
) -> None:  # fmt: skip
    """Write tokens after those that ``state`` counts, and count them.

    Args:
        key, value: ``[B, G, T, D]`` and ``[B, G, T, Dv]``.
        state: int32 ``[3]``: tokens, tokens with codes, and 0.
        fmt: the fields of ``Format``; the rest are those of ``Store``, with room for the tokens.
    """
    layout = _format(fmt)
    store = Store(
        key_words, key_scale, key_zero, value_words, value_scale, value_zero, tail_keys, tail_values
    )  # fmt: skip
    if can_run_triton(key):
        from . import launch

        key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (key, value))
        launch.append(store, layout, state, key, value)
    else:
        tokens, quantized, _ = state.tolist()
        state[1] = naive.append(store, layout, tokens, quantized, key, value)
        state[0] = tokens + key.shape[2]


@kv_append.register_fake
def _(key, value, state, fmt, *store) -> None:
    return None


@torch.library.custom_op("hf_optim::kv_attend", mutates_args=())
def kv_attend(
    query: Tensor, state: Tensor, new: int, longest: int, mask: Tensor | None, sinks: Tensor | None, scale: float,
    softcap: float, fmt: list[int], key_words: Tensor, key_scale: Tensor, key_zero: Tensor, value_words: Tensor,
    value_scale: Tensor, value_zero: Tensor, tail_keys: Tensor, tail_values: Tensor,
) -> Tensor:  # fmt: skip
    """Return the attention ``[B, Q, H, Dv]`` of ``query`` to a store; arguments as of ``naive.attend``.

    Args:
        state: int32 ``[3]``, the tokens before the ``new`` ones, and those with codes then.
        longest: the most tokens that there can be; ``mask`` has as many columns, or more.
    """
    layout = _format(fmt)
    store = Store(
        key_words, key_scale, key_zero, value_words, value_scale, value_zero, tail_keys, tail_values
    )  # fmt: skip
    if can_run_triton(query):
        from . import launch

        query = query if query.stride(-1) == 1 else query.contiguous()
        mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
        return launch.attend(query, state, new, longest, store, layout, mask, sinks, scale, softcap)
    tokens, quantized, _ = state.tolist()
    tokens += new
    return naive.attend(
        query, store, layout, tokens, layout.quantized(tokens, quantized), mask, sinks, scale, softcap
    )  # fmt: skip


@kv_attend.register_fake
def _(query, state, new, longest, mask, sinks, scale, softcap, fmt, *store) -> Tensor:
    B, H, Q, _ = query.shape
    return query.new_empty((B, Q, H, store[-1].shape[3]))


def _format(fields: list[int]) -> Format:
    bits, float8, per_token, group, residual, symmetric = fields
    return Format(bits, bool(float8), bool(per_token), group, residual, bool(symmetric))
