"""A batch behind its prefill: what a session loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache

from .static_cache import drops_keys, parts_of, unsupported_cache


@dataclass
class Prefilled:
    """What transformers' prefill leaves for the first step.

    Args:
        prompt: tokens ``[n, P]``, int64; of an encoder-decoder, those of the decoder. P is 0 for embeddings alone.
        mask: ``[n, M]`` with 0 for padding, M tokens in the cache; None without padding. Of an encoder-decoder, for the
            encoder's positions.
        positions: ``position_ids`` of the last token, ``[..., n, 1]``, or None.
        cache: keys and values.
        logits: of the last position, float32 ``[n, V]``.
        encoder: the encoder's outputs, the first of them ``[n, S, width]``; None of a model without one.
        patterned: the model's attention is that of a pattern.
    """

    prompt: Tensor
    mask: Tensor | None
    positions: Tensor | None
    cache: Any
    logits: Tensor
    encoder: Any = None
    patterned: bool = False

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return self.prompt.shape[0]

    @property
    def own(self) -> Cache:
        """The cache of the self-attention."""
        return self.cache.self_attention_cache if self.encoder is not None else self.cache

    @property
    def tokens(self) -> int:
        """Tokens in the cache."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    def why_stock(self) -> str | None:
        """Return why the steps after this prefill cannot be captured; None if they can be."""
        if self.cache is None:
            return "the model returns no cache"
        if self.patterned and (reason := self._why_not_in_slots()) is not None:
            return reason
        if self.encoder is None:
            return unsupported_cache(self.cache)
        if not isinstance(self.cache, EncoderDecoderCache):
            return f"the model keeps its state in a {type(self.cache).__name__}, without keys and values of the encoder"
        if not all(self.cache.is_updated.values()):
            return "a layer computes keys and values of the encoder at each step"
        return unsupported_cache(self.cache.self_attention_cache) or unsupported_cache(self.cache.cross_attention_cache)

    def _why_not_in_slots(self) -> str | None:
        """Return why the keys that a pattern sees have no slots; None if they have."""
        others = {type(layer).__name__ for layer in self.own.layers if not drops_keys(layer)}
        if others:
            return f"under this attention pattern the cache has a {min(others)}, whose state cannot stay at one address"
        if self.positions is None:
            return "under an attention pattern a step needs position_ids, which this model does not take"
        return None

    def structure(self) -> tuple[Any, ...]:
        """Return what besides its size decides about the buffers of a session."""
        positions = self.positions
        parts = (_shapes(self.own), None if positions is None else (positions.dtype, positions.shape[:-2]))
        if self.encoder is None:
            return parts
        mask = None if self.mask is None else self.mask.dtype
        return *parts, _shapes(self.cache.cross_attention_cache), self.encoder[0].shape[2], self.encoder[0].dtype, mask


def _shapes(cache: Any) -> tuple[Any, ...]:
    return tuple(
        (held.keys.shape[1::2], held.values.shape[1::2], held.keys.dtype, getattr(held, "scheme", None))
        if held.is_initialized
        else None
        for layer in cache.layers
        for held in parts_of(layer) or [layer]
    )
