"""What a quantized cache layer hands to attention on our kernels in place of keys and values."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

SPECIFICATION = "hf_optim_kernels.decode_attention.naive"
# How many contexts are open in which attention takes codes.
_OPEN = 0


class Codes:
    """The keys, or the values, of a quantized layer, to be decoded by the kernel that reads them.

    Attributes:
        layer: the cache layer.
        dtype: of the numbers that it stands for.
    """

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        self.layer = layer
        self.dtype = dtype


def attention_takes_codes() -> bool:
    """Return True inside of ``taking_codes``."""
    return _OPEN > 0


@contextmanager
def taking_codes(ours: bool) -> Iterator[None]:
    """Let quantized layers hand codes to attention inside the context, if it is ``ours``."""
    global _OPEN
    _OPEN += ours
    try:
        yield
    finally:
        _OPEN -= ours


def attend_to_codes(module: Any, query: Tensor, codes: Codes, mask: Tensor | None, **kwargs: Any) -> Tensor:
    """Return the attention ``[B, Q, H, Dv]`` of a query to a quantized layer.

    Args:
        module: the attention layer.
        query: ``[B, H, Q, D]``.
        codes: what the cache layer returned.
        mask, kwargs: as of an attention function of transformers.

    What the kernel does not take is decoded, and runs in PyTorch.
    """
    layer = codes.layer
    scaling, softcap, sinks = kwargs.get("scaling"), float(kwargs.get("softcap") or 0.0), kwargs.get("s_aux")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    causal = mask is None and query.shape[2] > 1
    if not causal and kwargs.get("position_bias") is None:
        if layer.unsupported(query, mask) is None:
            attended: Tensor = layer.attention(query, mask, sinks, scale, softcap)
            return attended
        if softcap or sinks is not None:  # sdpa has neither
            plain = importlib.import_module(SPECIFICATION).decode_attention
            attended = plain(query, *layer.decoded(), mask, None, sinks, scale, softcap)
            return attended
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    out: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, *layer.decoded(), mask, **kwargs)[0]
    return out
