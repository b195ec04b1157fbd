"""Attention of a decoding step on hf_optim's kernel, for models that use transformers' attention interface."""

from __future__ import annotations

import importlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import util
from typing import Any

import torch
from torch import Tensor

from .codes import Codes, attend_to_codes, taking_codes

# Free of the names of other backends, which transformers looks for in it.
NAME = "hf_optim_decode"
KERNEL = "hf_optim_kernels.decode_attention.op"
# Only these are replaced: a user who chose another implementation keeps it.
REPLACED = ("sdpa", "eager")
RANGES = "_hf_optim_ranges"
# Masks and their ranges in the forward that torch.compile is tracing: it does not merge equal work of the layers.
_TRACED: list[tuple[Tensor, Tensor]] = []
_OPEN: list[None] = []  # one for each context in which the name is registered
_OPENING = threading.Lock()
_KERNEL: list[Any] = []  # the module, imported once; torch.compile cannot trace an import


def decode_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attend to a key/value cache; an attention function of transformers, for a few new tokens.

    Args:
        module: the attention layer.
        query: ``[B, H, Q, D]``.
        key, value: ``[B, G, N, D]`` and ``[B, G, N, Dv]``, with the new tokens; or the ``Codes`` of a quantized layer.
        attention_mask: bool ``[B, 1, Q, N]``. None: a single query attends everywhere, several as
            ``module.is_causal`` says.
        kwargs: ``scaling``, ``softcap`` and ``s_aux`` (sinks ``[H]``) are used.

    Returns the output ``[B, Q, H, Dv]``, and None. What the kernel does not take runs in ``sdpa`` or, with a softcap or
    sinks, by the kernel's specification.
    """
    if isinstance(key, Codes):
        return attend_to_codes(module, query, key, attention_mask, **kwargs), None
    op = _KERNEL[0]
    softcap, sinks, scaling = float(kwargs.get("softcap") or 0.0), kwargs.get("s_aux"), kwargs.get("scaling")
    positions = kwargs.get("position_bias") is not None
    attend = op.decode_attention
    if positions or op.unsupported(query, key, value, attention_mask) is not None:
        if positions or not (softcap or sinks is not None):
            from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

            return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)
        attend = op.naive.decode_attention  # sdpa has no softcap, and leaves sinks out
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    ranges = None
    if attention_mask is not None:
        ranges = mask_ranges(attention_mask)
    elif query.shape[2] > 1 and kwargs.get("is_causal", getattr(module, "is_causal", True)):
        ranges = causal_ranges(query.shape[2], key.shape[2], query.device)
    return attend(query, key, value, attention_mask, ranges, sinks, scale, softcap), None


def mask_ranges(mask: Tensor) -> Tensor:
    """Return the ranges of a mask for the kernel, computed once for the layers that share the mask."""
    compute = _KERNEL[0].mask_ranges
    if torch.compiler.is_compiling():
        for known, ranges in _TRACED:
            if known is mask:
                return ranges
        _TRACED.append((mask, compute(mask)))
        return _TRACED[-1][1]
    if mask.is_inference():  # such a tensor has no version to tell changes by
        return compute(mask)
    found: Any = getattr(mask, RANGES, None)
    if found is None or found[0] != mask._version:
        found = (mask._version, compute(mask))
        setattr(mask, RANGES, found)
    return found[1]


def forget_traced() -> None:
    """Forget the masks of a forward; called by what ``torch.compile`` traces, before and after it."""
    _TRACED.clear()


def causal_ranges(tokens: int, positions: int, device: torch.device) -> Tensor:
    """Return the ranges of ``tokens`` new tokens at the end of ``positions``, each of which sees those before it."""
    end = torch.arange(positions - tokens + 1, positions + 1, dtype=torch.int32, device=device)
    return torch.stack([torch.zeros_like(end), end, end], dim=-1)[None]


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if not _KERNEL:
        _KERNEL.append(importlib.import_module(KERNEL))
    AttentionInterface.register(NAME, decode_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _unregister() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    for registry in (AttentionInterface, AttentionMaskInterface):
        registry._global_mapping.pop(NAME, None)


def _available(model: Any) -> bool:
    if model.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return False
    return util.find_spec("triton") is not None and type(model)._can_set_attn_implementation()


@contextmanager
def on_kernel(model: Any) -> Iterator[None]:
    """Let the attention of a model run on the kernel inside the context, where its implementation is ``REPLACED``.

    The kernel reads grouped keys and values once; the stock path repeats them for each query head. Models whose
    attention is not in transformers' table are not changed by it.
    """
    if not _available(model):
        yield
        return
    with _OPENING:
        _OPEN.append(None)
        _register()
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(config, getattr(config, "_attn_implementation", None)) for config in configs.values()]
    try:
        for config, name in before:
            if name in REPLACED:
                config._attn_implementation = NAME
        with taking_codes(model.config.get_text_config(decoder=True)._attn_implementation == NAME):
            yield
    finally:
        with _OPENING:
            _OPEN.pop()
            if not _OPEN:
                _unregister()
        for config, name in before:
            if name in REPLACED:
                config._attn_implementation = name
