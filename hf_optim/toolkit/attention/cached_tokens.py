"""How many keys a cache holds under a pattern."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from .attachment import FIELD
from .attend import HeadPatterns
from .kept import Kept


@lru_cache(maxsize=256)
def tokens_kept(heads: HeadPatterns, length: int) -> int:
    """Return how many keys of a row a later token can see, the most at any time up to ``length`` tokens.

    The number can fall, at the end of a chunk or after a global token that sees all: ``Term.fullest`` says where.
    """
    terms = [term for pattern in heads.patterns for term in pattern.terms]
    tried = {length}.union(*(term.fullest(length) for term in terms))
    return max((_kept_at(heads, place) for place in tried if place > 0), default=0)


def _kept_at(heads: HeadPatterns, length: int) -> int:
    _, after = Kept.first(heads, length, torch.device("cpu")).visible_later(None)
    return after.places.shape[1]


def patterns_of(config: Any) -> list[HeadPatterns] | None:
    """Return the patterns of each layer of a decoder, from its configuration; None for a model without a pattern.

    Raises ``ValueError`` for settings that make no pattern, and if the code of the model is not loaded.
    """
    from transformers import AttentionInterface

    if getattr(config, FIELD, None) is None:
        return None
    name = getattr(type(config), "implementation", "") or config._attn_implementation
    found = AttentionInterface().get(name)
    attachment = getattr(found, "__self__", None)
    if attachment is None:
        raise ValueError(f"the attention pattern {str(name)[:40]!r} is not registered: load the model first")
    if not getattr(attachment, "counts_keys", True):
        raise ValueError("a cache of this model holds more than keys of tokens: ask its layers for nbytes()")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    patterns: list[HeadPatterns] = [attachment.patterns(config, layer, heads, True) for layer in range(layers)]
    return patterns
