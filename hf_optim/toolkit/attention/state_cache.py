"""A layer of a cache that holds the state of an attention in the place of keys and values.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from .pattern_models import is_detached
from .row_state import TensorState


class StateLayer(DynamicLayer):
    """One layer of a cache. ``update`` takes new keys, and the attention function, which follows, says what is kept.

    Attributes:
        state: what is kept; None before the first tokens.
        seen: tokens that were read, padding included.
        counts: tokens of each row that were read, without padding.
        marks: which places of each row were padding, as ``NewTokens.marks``.
        owner: the name and the settings of the attention whose state it is.
    """

    is_sliding = False
    made_for_a_technique = True
    is_compileable = False
    is_croppable = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.state: TensorState | None = None
        self.seen = 0
        self.counts: tuple[int, ...] = ()
        self.marks: tuple[int, ...] = ()
        self.owner = ""
        self._waits = self._offloads = False

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values ``[B, G, N, D]``, the keys with a reference to this layer.

        Raises ``ValueError`` if the attention function did not follow the update before.
        """
        if self._waits:
            raise ValueError(
                "the last tokens of this cache did not reach the attention whose state it holds: a forward failed, or "
                "the cache is used by another model. Start a new one"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self.state is not None and self.state.rows != len(key_states):
            raise ValueError(f"the cache holds {self.state.rows} rows, and got tokens of {len(key_states)}")
        self._waits = True
        keys = key_states[:]
        keys.hf_optim_state = self  # type: ignore[attr-defined]
        return keys, value_states

    def keep(self, state: TensorState, owner: str, seen: int, counts: tuple[int, ...], marks: tuple[int, ...]) -> None:
        """Keep the state of ``owner`` after ``seen`` tokens, ``counts`` of each row without padding, at ``marks``."""
        self.state, self.owner, self.seen, self.counts, self.marks = state, owner, seen, counts, marks
        self._waits = False
        if self._offloads:
            self.offload()

    def nbytes(self) -> int:
        """Return the bytes of the state."""
        return 0 if self.state is None else self.state.nbytes()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the mask, which covers all tokens, and its offset."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens were read."""
        return self.seen

    def crop(self, tokens_to_remove: int) -> None:
        """Raise ``ValueError``: tokens cannot be taken out of a state."""
        if tokens_to_remove:
            raise ValueError(
                "a cache that holds the state of an attention cannot be cropped: generate without an assistant"
            )

    def reset(self) -> None:
        """Forget all tokens."""
        self.state, self.seen, self.counts, self.marks, self.owner = None, 0, (), (), ""
        self._waits = self._offloads = self.is_initialized = False

    def _choose(self, index: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.of_rows(index)
            rows = index.tolist()
            self.counts, self.marks = (tuple(each[row] for row in rows) for each in (self.counts, self.marks))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch, for beam search."""
        self._choose(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._choose(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen rows of the batch, by number or as bool ``[B]``."""
        self._choose(torch.arange(len(self.counts))[indices.cpu()])

    def offload(self) -> None:
        """Move the state to the CPU: where new tokens wait for the attention, after it has read the state."""
        self._offloads = self._waits
        if self.state is not None and not self._waits:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back to its device."""
        if self.state is not None:
            self.state = self.state.to(self.device)


class HoldsState(nn.Module):
    """Mixin of an attention module whose caches hold its state."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not self.training and not is_detached(getattr(self, "config", None)):
            hold_state(self, (*args, *kwargs.values()))
        return super().forward(*args, **kwargs)


def hold_state(module: nn.Module, given: tuple[Any, ...]) -> None:
    """Make the layer of an attention module a ``StateLayer`` in the cache among the arguments of its forward.

    Raises ``ValueError`` for a layer that holds keys, or that is of another kind: static, quantized, offloaded ones
    are for keys and values.
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
            cache.layers[number] = StateLayer()
        elif not hasattr(layer, "owner"):
            raise ValueError(
                f"the attention of this model keeps a state, which a {type(layer).__name__} cannot hold: leave "
                "cache_implementation out, and start with an empty cache"
            )
