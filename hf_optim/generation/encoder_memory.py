"""What the decoder of an encoder-decoder attends to in the encoder, at fixed addresses."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


class EncoderMemory:
    """The encoder's output ``[rows, length, width]``, its mask, and the keys and values of each cross-attention.

    The encoder runs once, in the prefill, which also computes keys and values. Positions beyond those of the batch are
    masked; a model that takes no mask (Whisper) has a memory of exactly its length.

    Args:
        source: the cross-attention cache of a prefill.
        outputs: of the encoder: an output class of transformers whose first field is ``[n, S, width]``.
        mask: ``[n, S]``, or None if the model takes none.
        rows, length: rows of the batch and positions of the encoder that fit.
    """

    def __init__(self, source: Cache, outputs: Any, mask: Tensor | None, rows: int, length: int) -> None:
        states = outputs[0]
        self.kind = type(outputs)
        self.rows = rows
        self.length = length
        self.states = states.new_zeros((rows, length, states.shape[2]))
        self.mask = None if mask is None else mask.new_zeros((rows, length))
        layers: list[Any] = []
        given: Any
        for given in source.layers:
            layer = DynamicLayer()
            heads, size = given.keys.shape[1], given.keys.shape[3]
            layer.lazy_initialization(given.keys, given.values)
            layer.keys = given.keys.new_zeros((rows, heads, length, size))
            layer.values = given.values.new_zeros((rows, given.values.shape[1], length, given.values.shape[3]))
            layers.append(layer)
        self.cache = Cache(layers=layers)

    def fill(self, source: Cache, outputs: Any, mask: Tensor | None) -> None:
        """Copy a prefilled batch of up to ``rows`` rows; the other rows get its first."""
        states = outputs[0]
        length = states.shape[1]
        pairs: list[tuple[Tensor, Tensor, int]] = [(self.states, states, 1)]
        if self.mask is not None and mask is not None:
            pairs.append((self.mask, mask, 1))
        layer: Any
        given: Any
        for layer, given in zip(self.cache.layers, source.layers, strict=True):
            pairs += [(layer.keys, given.keys, 2), (layer.values, given.values, 2)]
        for mine, theirs, dim in pairs:
            window = mine.narrow(dim, 0, length)
            window[: theirs.shape[0]].copy_(theirs)
            window[theirs.shape[0] :].copy_(theirs[:1])
            # Masked positions are multiplied by zero, which a number that is not finite would survive.
            mine.narrow(dim, length, self.length - length).zero_()

    def inputs(self) -> dict[str, Any]:
        """Return the arguments of the decoder's forward that say what to attend to in the encoder."""
        return {"encoder_outputs": self.kind(last_hidden_state=self.states), "attention_mask": self.mask}

    def with_own(self, cache: Cache) -> EncoderDecoderCache:
        """Return the cache of the model, with ``cache`` for the self-attention."""
        return EncoderDecoderCache(cache, self.cache)
