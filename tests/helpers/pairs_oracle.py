"""Dense attention under a boolean mask, in any model on transformers' interfaces: the oracle of sparse attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

NAME = "tests_pairs_oracle"


@contextmanager
def masked_attention(model: PreTrainedModel, seen: Callable[[int, int, int], Tensor]) -> Iterator[PreTrainedModel]:
    """Compute the softmax of each head under ``seen(layer, head, tokens)``, bool ``[tokens, tokens]``, in the body.

    The mask says all: no padding, and in a causal model it must leave the future out.
    """
    modules = [module for module in model.modules() if hasattr(module, "is_causal")]

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        layer, heads, tokens = modules.index(module), query.shape[1], key.shape[2]
        key, value = (part.repeat_interleave(heads // part.shape[1], 1) for part in (key, value))
        scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        mask = torch.stack([seen(layer, head, tokens) for head in range(heads)])
        weights = torch.softmax(scores.masked_fill(~mask, -torch.inf), -1)
        return (weights @ value).transpose(1, 2).contiguous(), None

    before = model.config._attn_implementation
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, lambda **kwargs: None)
    try:
        model.set_attn_implementation(NAME)
        yield model
    finally:
        model.set_attn_implementation(before)
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(NAME)
