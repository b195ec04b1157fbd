"""A key/value cache that holds compressed windows, and the tokens that are not compressed yet.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from ._key_compression import Held


class CompressedLayer(DynamicLayer):
    """One layer of a cache. ``update`` takes new keys, and the attention function, which follows, says what is kept.

    Attributes:
        held: what is kept; None before the first tokens.
        seen: tokens that were read, padding included.
    """

    is_sliding = False
    made_for_a_technique = True
    is_compileable = False
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.held: Held | None = None
        self.seen = 0
        self._waits = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values ``[B, G, N, D]``, the keys with a reference to this layer.

        Raises ``ValueError`` if the attention function did not follow the update before.
        """
        if self._waits:
            raise ValueError(
                "the last tokens of this cache did not reach compressed attention: a forward failed, or the cache is "
                "used by another model. Start a new one"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.held is not None and len(self.held.tokens) != len(key_states):
            raise ValueError(f"the cache holds {len(self.held.tokens)} rows, and got tokens of {len(key_states)}")
        self._waits = True
        keys = key_states[:]
        keys.hf_optim_compressed = self  # type: ignore[attr-defined]
        return keys, value_states

    def keep(self, held: Held, count: int) -> None:
        """Keep ``held`` after ``count`` more tokens, padding included."""
        self.held, self.seen, self._waits = held, self.seen + count, False

    def nbytes(self) -> int:
        """Return the bytes of keys and values."""
        return 0 if self.held is None else sum(part.numel() * part.element_size() for part in self.held.tensors)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the mask, which covers all tokens, and its offset."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens were read."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ``ValueError``: tokens of a compressed window cannot be taken back."""
        if tokens_to_remove:
            raise ValueError("a cache of compressed keys cannot be cropped: generate without an assistant")

    def reset(self) -> None:
        """Forget all tokens."""
        self.held, self.seen, self._waits, self.is_initialized = None, 0, False, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch, for beam search."""
        if self.held is not None:
            self.held = self.held.of_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self.held is not None:
            self.held = self.held.of_rows(torch.arange(len(self.held.tokens)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen rows of the batch, by number or as bool ``[B]``."""
        if self.held is not None:
            self.held = self.held.of_rows(torch.arange(len(self.held.tokens))[indices.cpu()])

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        if self.held is not None:
            self.held = self.held.to("cpu")

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        if self.held is not None:
            self.held = self.held.to(self.device)


def hold_compressed(module: nn.Module, given: tuple[Any, ...]) -> None:
    """Make the layer of an attention module a ``CompressedLayer`` in the cache among the arguments of its forward.

    Layers that hold tokens stay as they are: their keys are compressed again in each forward.
    """
    number = getattr(module, "layer_idx", None)
    for value in given:
        if not isinstance(value, Cache) or number is None:
            continue
        cache = getattr(value, "self_attention_cache", value)
        if cache.layer_class_to_replicate is DynamicLayer:
            while len(cache.layers) <= number:
                cache.layers.append(DynamicLayer())
        layer = cache.layers[number] if number < len(cache.layers) else None
        if type(layer) is DynamicLayer and not layer.get_seq_length():
            cache.layers[number] = CompressedLayer()
