"""A cache layer that holds for each key/value head only the keys that its query heads can still see.

Heads that see about as far as each other share a tensor, so that a step reads a few of them and not one for each head.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .caches import HeldKeys, PatternLayer
from .device_constants import constant_on

Groups = tuple[tuple[int, ...], ...]  # of key/value heads
NARROWEST = 64  # tokens; heads that see fewer are kept together


def groups_of(counts: Sequence[int]) -> Groups:
    """Return key/value heads in groups, given how many keys each of them sees: those between two powers of 2."""
    found: dict[int, list[int]] = {}
    for head, count in enumerate(counts):
        found.setdefault((max(count, NARROWEST) - 1).bit_length(), []).append(head)
    return tuple(tuple(found[size]) for size in sorted(found))


class HeadGroupsLayer(DynamicLayer):
    """The keys and values of one layer, by groups of heads, each in a ``PatternLayer``.

    ``update`` takes new keys, and the attention function, which knows the groups, gives them to the parts (``take``).

    Attributes:
        groups: the heads of each part; None while they are not known.
        parts: one layer for each group; while they are not known, at most one of all heads.
    """

    made_for_a_technique = True
    holds_visible_keys = True
    takes_rings = True  # the attention function of this source hands a step over to rings of keys
    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.record_past = False
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self.groups: Groups | None = None
        self.parts: list[PatternLayer] = []
        self._waiting: tuple[Tensor, Tensor] | None = None

    def adopt(self, layer: DynamicLayer) -> None:
        """Take over the keys of a layer that holds all of them."""
        if not layer.is_initialized or layer.keys is None or not layer.keys.numel():
            return
        self.lazy_initialization(layer.keys, layer.values)  # type: ignore[arg-type]
        self.record_past = getattr(layer, "record_past", False)
        part = PatternLayer()
        part.adopt(layer)
        self.parts = [part]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the new keys and values ``[B, G, N, D]``, the keys as ``HeldKeys`` of this layer.

        Raises ``ValueError`` if the attention function has not taken the ones before.
        """
        if self._waiting is not None:
            raise ValueError(
                "the attention pattern did not see the last tokens of this cache: a forward failed on the way. Start a "
                "new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._waiting = key_states, value_states
        return HeldKeys.of(key_states, self), value_states  # type: ignore[arg-type]

    def take(self, groups: Groups) -> Iterator[tuple[PatternLayer, Tensor, Tensor]]:
        """Give the new tokens to the parts, and yield each with all keys and values that it holds with them.

        The caller settles a part before it asks for the next. Raises ``ValueError`` if the cache has other groups.
        """
        assert self._waiting is not None
        key, value = self._waiting
        self._waiting = None
        if self.groups is None:
            self._split(groups)
        elif self.groups != groups:
            raise ValueError("the cache holds the keys that other spans see: start a new one")
        for part, group in zip(self.parts, groups, strict=True):
            keys, values = part.update(of_group(key, group, groups), of_group(value, group, groups))
            yield part, keys.plain(), values  # type: ignore[attr-defined]

    def _split(self, groups: Groups) -> None:
        whole = self.parts[0] if self.parts else None
        self.groups, self.parts = groups, []
        for group in groups:
            part = PatternLayer()
            if whole is not None:
                held = DynamicLayer()
                held.update(of_group(whole.keys, group, groups), of_group(whole.values, group, groups))
                part.adopt(held)
            if self.record_past:
                part.activate_past_recording()
            self.parts.append(part)

    def settle(self, *args: Any) -> None:
        """Raise ``ValueError``: an attention function that has no groups of heads was called."""
        raise ValueError("the cache holds keys by groups of heads, for another attention: start a new one")

    @property
    def fresh(self) -> bool:
        """True before the first tokens: all keys are those of the running forward."""
        return self.get_seq_length() == 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the mask: it covers all tokens, also those that are dropped."""
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have been read."""
        return self.parts[0].get_seq_length() if self.parts else 0

    def nbytes(self) -> int:
        """Return the bytes of keys and values, with the room for later ones."""
        return sum(part.nbytes() for part in self.parts)

    def held_bytes(self) -> int:
        """Return the bytes of the keys and values that are held."""
        held = [each for part in self.parts for each in (part.keys, part.values) if each is not None]
        return sum(each.numel() * each.element_size() for each in held)

    def _each(self, change: Callable[[PatternLayer], None]) -> None:
        for part in self.parts:
            change(part)

    def activate_past_recording(self) -> None:
        """Drop keys only in ``crop``, so that tokens can be taken back until then."""
        self.record_past = True
        self._each(PatternLayer.activate_past_recording)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens. Raises ``ValueError`` if keys from before them are gone."""
        for part in self.parts:  # before any of them changes
            if part.kept is not None and tokens_to_remove < 0 and -tokens_to_remove < part.get_seq_length():
                part.kept.cropped(-tokens_to_remove)
        self._each(lambda part: part.crop(tokens_to_remove))
        if self.parts and not self.parts[0].get_seq_length():
            self._forget()

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch, for beam search."""
        self._each(lambda part: part.reorder_cache(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._each(lambda part: part.batch_repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen rows of the batch, by number or as bool ``[B]``."""
        self._each(lambda part: part.batch_select_indices(indices))

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self._each(PatternLayer.offload)

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        self._each(PatternLayer.prefetch)


def of_group(part: Tensor, group: tuple[int, ...], groups: Groups) -> Tensor:
    """Return the heads of a group of ``[B, G, N, D]``."""
    return part if len(groups) == 1 else part.index_select(1, constant_on(group, part.device))
