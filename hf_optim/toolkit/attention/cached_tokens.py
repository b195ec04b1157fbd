"""How many keys a cache holds under a pattern, and for how long."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .attachment import FIELD
from .head_patterns import HeadPatterns
from .kept import NO_LIMIT
from .pattern import kept_tensors
from .pattern_models import is_detached

NEVER = NO_LIMIT  # no later token is the first that does not see a key


@kept_tensors(64)
def expiries(heads: HeadPatterns, length: int) -> Tensor:
    """Return for the key at each position the first query position from which no head sees it, int64 ``[length]``.

    It is ``NEVER`` for keys that are still seen behind ``length`` tokens. A key that is not seen any more is not seen
    again, so that the position is found by halving.
    """
    key = torch.arange(length)
    low, high = key + 1, torch.full_like(key, length + 1)
    if heads.reads_length or not heads.causal:
        return torch.full_like(key, NEVER)
    while bool((low < high).any()):
        middle = (low + high) // 2
        found = torch.stack([pattern.stays(key, middle, NO_LIMIT) for pattern in heads.patterns]).any(0)
        low, high = torch.where(found & (low < high), middle + 1, low), torch.where(found, high, middle)
    return torch.where(low > length, NEVER, low)


@lru_cache(maxsize=256)
def tokens_kept(heads: HeadPatterns, length: int) -> int:
    """Return how many keys of a row a later token can see, the most at any time up to ``length`` tokens.

    The number can fall, at the end of a chunk or after a global token that sees all.
    """
    if length < 1:
        return 0
    gone = torch.bincount(expiries(heads, length).clamp_max(length + 1), minlength=length + 2)[: length + 1].cumsum(0)
    return int((torch.arange(length + 1) - gone).max())


def most_seen(heads: HeadPatterns, length: int) -> int:
    """Return how many keys all heads together see at most, in a step of a causal row of ``length`` tokens."""
    terms = dict.fromkeys(term for pattern in heads.patterns for term in pattern.terms)
    return min(length, sum(term.most_seen(length) for term in terms))


def patterns_of(config: Any) -> list[HeadPatterns] | None:
    """Return the patterns of each layer of a decoder, from its configuration; None for a model without a pattern.

    Raises ``ValueError`` for settings that make no pattern, and if the code of the model is not loaded.
    """
    from transformers import AttentionInterface

    if getattr(config, FIELD, None) is None or is_detached(config):
        return None
    attachment = getattr(type(config), "attachment", None)
    if attachment is None:  # of a model of a stock class
        name = config._attn_implementation
        attachment = getattr(AttentionInterface().get(name), "__self__", None)
        if attachment is None:
            raise ValueError(f"the attention pattern {str(name)[:40]!r} is not registered: load the model first")
    if not getattr(attachment, "counts_keys", True):
        raise ValueError("a cache of this model holds more than keys of tokens: ask its layers for nbytes()")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    patterns: list[HeadPatterns] = [attachment.patterns(config, layer, heads, True) for layer in range(layers)]
    return patterns
