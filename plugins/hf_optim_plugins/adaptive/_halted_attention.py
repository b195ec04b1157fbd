"""Attention of the tokens of a step that still run, over the keys of all.

A step's keys and values are gathered in ``StepKeys``: those of running tokens from their layer, those of halted ones
from the projections alone. This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, Cache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from ._chosen_tokens import Chosen

# Checkpoints bring their code: each module has a name of its own, so that none computes with the code of another.
NAME = f"hf_optim_halting_{zlib.crc32(__name__.encode()):08x}"


class OnlyKeys(Exception):
    """Leaves a block after the projections of keys and values, which is all that was asked of it."""


class StepKeys:
    """The keys and values of all new tokens of a step.

    Attributes:
        key, value: ``[B, G, N, D]`` once there are any; zeros for padding.
        chosen: the tokens that the block is called with.
        only_keys: the block is called for the keys of these tokens alone.
    """

    def __init__(self, cache: Cache | None, number: int) -> None:
        self.cache, self.number = cache, number
        self.key: Tensor | None = None
        self.value: Tensor | None = None
        self.chosen: Chosen | None = None
        self.only_keys = False

    def store(self, key: Tensor, value: Tensor) -> None:
        """Keep the keys and values ``[R, G, M, D]`` of the chosen tokens."""
        assert self.chosen is not None
        batch, count = self.chosen.shape
        for name, new in (("key", key), ("value", value)):
            whole = getattr(self, name)
            if whole is None:
                whole = new.new_zeros(batch, new.shape[1], count, new.shape[3])
            elif torch.is_grad_enabled():
                whole = whole.clone()
            self.chosen.put(whole.transpose(1, 2), new.transpose(1, 2))
            setattr(self, name, whole)

    def copies(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values for another step to write into; a cache may hold these."""
        assert self.key is not None
        assert self.value is not None
        return (self.key, self.value) if self.cache is None else (self.key.clone(), self.value.clone())

    def complete(self) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the step with those in the cache, ``[B, G, S, D]``; the cache takes them."""
        assert self.key is not None
        assert self.value is not None
        if self.cache is None:
            return self.key, self.value
        return self.cache.update(self.key, self.value, self.number)


def attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Compute softmax attention as transformers' ``sdpa``; in a step with halted tokens, of those that run over all.

    Args:
        module: a module of attention, with ``passage``.
        query: ``[R, H, M, D]``.
        key, value: ``[R, G, M, D]``; in a step without halted tokens, those of all, with the cache's.
        attention_mask: bool or float ``[R, 1 or H, M, S]``, or None.

    Returns:
        ``[R, M, H, D]``, and None.
    """
    if kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None:
        raise ValueError("halting does not support attention with a soft cap of the scores or with sinks")
    if kwargs.get("output_attentions"):
        raise ValueError("halting does not form the weights of attention: leave output_attentions out")
    keys: StepKeys | None = getattr(vars(module).get("passage"), "keys", None)
    if keys is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    chosen = keys.chosen
    assert chosen is not None
    keys.store(key, value)
    if keys.only_keys:
        raise OnlyKeys
    key, value = keys.complete()
    if len(chosen.rows) < chosen.shape[0]:
        key, value = key[chosen.rows], value[chosen.rows]
    causal = kwargs.pop("is_causal", None)
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    if attention_mask is None and causal and chosen.shape[1] > 1:  # a first pass without padding
        attention_mask = (torch.arange(key.shape[2], device=key.device) <= chosen.places[..., None])[:, None]
    if attention_mask is not None and attention_mask.dtype == torch.bool:  # others in a row may be padding
        attention_mask = attention_mask | ~chosen.real[:, None, :, None]
    return sdpa_attention_forward(module, query, key, value, attention_mask, is_causal=False, **kwargs)


def register() -> None:
    """Register the attention and its mask with transformers. Repeated calls replace what was there."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


register()
