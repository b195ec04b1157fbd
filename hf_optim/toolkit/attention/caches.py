"""A key/value cache that holds only the keys that a later token can see.

``update`` adds the new keys of a layer, and the attention function says what they are (``settle``). In between they are
``HeldKeys``, with which nothing else can compute: keys that are not neighbours mean nothing to any other attention.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .head_patterns import HeadPatterns
from .kept import Kept, take_tokens
from .rows import Rows

LEAST_ROOM, MOST_ROOM = 64, 1024  # tokens


def slots_for(tokens: int) -> int:
    """Return the slots of a layer that holds ``tokens`` keys: an eighth more for later ones, from 64 to 1024."""
    return tokens + min(max(LEAST_ROOM, tokens // 8), MOST_ROOM)


class HeldKeysError(ValueError):
    """Something else than the attention function has read keys that are held for it."""


class HeldKeys(Tensor):
    """Keys of a cache that holds some tokens of a row, on their way to the attention function that knows which.

    What has numbers of them as its result raises ``HeldKeysError``; their shape, dtype and device can be read.
    """

    held_by: PatternLayer

    @staticmethod
    def of(keys: Tensor, layer: PatternLayer) -> HeldKeys:
        """Return keys ``[B, G, K, D]`` of a layer."""
        held = keys.view(keys.shape).as_subclass(HeldKeys)
        held.held_by = layer
        return held

    def plain(self) -> Tensor:
        """Return the keys as an ordinary tensor."""
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **(kwargs or {}))
        if isinstance(found, (bool, int, str, torch.Size, torch.dtype, torch.device, torch.layout)):
            return found
        raise HeldKeysError(
            "this cache holds only the keys that an attention pattern sees, and no other attention can compute with "
            "them: make a new cache for a model without the pattern, or set use_cache=False"
        )


class PatternLayer(DynamicLayer):
    """The keys and values of one layer that its patterns can still see.

    Keys are dropped after each forward of several tokens, and when the room for single ones is full. A layer never has
    more slots than ``slots_for`` the largest number of keys that were visible so far, in the row of the batch that
    needs most.

    Attributes:
        keys, values: ``[B, G, K, D]``; None before the first tokens.
        kept: which tokens these are.
        record_past: keys are dropped only by ``crop``, since tokens may be taken back.
    """

    made_for_a_technique = True  # other attention must not read it
    holds_visible_keys = True  # classes of the same source, loaded with checkpoints, know each other by it
    keys: Any
    values: Any
    is_sliding = False
    is_compileable = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._forget()
        self.record_past = False

    def _forget(self) -> None:
        self.keys = self.values = None
        self.is_initialized = False
        self.kept: Kept | None = None
        self._first: Kept | None = None
        self._tokens = 0
        self._room: tuple[Tensor, Tensor] | None = None  # the slots that keys and values are the beginning of
        self._rows: Rows | None = None
        self._waiting = 0  # tokens that are not settled

    def adopt(self, layer: DynamicLayer) -> None:
        """Take over the keys of a layer that holds all of them."""
        if not layer.is_initialized or layer.keys is None or not layer.keys.numel():
            return
        keys, values = layer.keys, layer.values
        assert values is not None
        self.lazy_initialization(keys, values)
        self.keys, self.values = keys, values
        self._tokens = self.keys.shape[2]
        self.record_past = getattr(layer, "record_past", False)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add keys and values ``[B, G, N, D]``, and return all that the new tokens can see, ``[B, G, K, D]``.

        The keys are ``HeldKeys``. Raises ``ValueError`` for keys of other sizes, and if the attention function has not
        seen the ones before.
        """
        if self._waiting:
            raise ValueError(
                "the attention pattern did not see the last tokens of this cache: a forward failed on the way. Start a "
                "new cache"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        elif self._tokens and (self.keys.shape[:2], self.keys.shape[3]) != (key_states.shape[:2], key_states.shape[3]):
            raise ValueError(
                f"the cache holds keys of {list(self.keys.shape[:2])} rows and heads, {self.keys.shape[3]} wide, "
                f"not {list(key_states.shape[:2])} of {key_states.shape[3]}: it was made for another model or batch"
            )
        self._waiting = key_states.shape[2]
        self.keys, self.values = self._append(key_states, value_states)
        return HeldKeys.of(self.keys, self), self.values

    def _append(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        held, new = self._held, key.shape[2]
        if held == 0 and new > 1:
            self._room = None
            return key, value
        if self._room is not None and held + new <= self._room[0].shape[2] and self._may_write(key, value):
            for slots, part in zip(self._room, (key, value), strict=True):
                slots[:, :, held : held + new] = part
            return self._room[0][:, :, : held + new], self._room[1][:, :, : held + new]
        self._room = None
        if held == 0:
            return key, value
        return torch.cat([self.keys, key], 2), torch.cat([self.values, value], 2)

    def _may_write(self, *parts: Tensor) -> bool:
        assert self._room is not None
        for slots, part in zip(self._room, parts, strict=True):
            if (
                slots.dtype != part.dtype
                or slots.device != part.device
                or (torch.is_grad_enabled() and part.requires_grad)
            ):
                return False
            if slots.requires_grad or (slots.is_inference() and not torch.is_inference_mode_enabled()):
                return False
        return True

    @property
    def _held(self) -> int:
        return self.keys.shape[2] if self.is_initialized and self.keys is not None and self.keys.dim() == 4 else 0

    def settle(self, heads: HeadPatterns, rows: Rows | None) -> Kept:
        """Say what the tokens of the last ``update`` are, drop keys, and return which keys the update returned.

        Args:
            heads: the patterns of the layer.
            rows: of all tokens so far; None if each row is one document without padding.

        Raises ``ValueError`` for tokens that cannot continue the row.
        """
        before, count = self._tokens, self._waiting
        if before:
            self._check(heads, rows)
        known = self.kept
        kept = known.with_more(count) if known else Kept.first(heads, before + count, self.keys.device)
        self._first = None if known else kept  # until all layers have found it
        self.kept, self._tokens, self._waiting = kept, before + count, 0
        self._rows = rows
        full = self._room is None or self._held == self._room[0].shape[2]
        if not self.record_past and (count > 1 or full):
            self._drop()
        elif full:
            self._make_room()
        return kept

    def _check(self, heads: HeadPatterns, rows: Rows | None) -> None:
        if self.kept is not None and self.kept.heads != heads:
            raise ValueError("the cache holds the keys that another attention pattern sees: make a new one")
        if heads.reads_length:
            raise ValueError(
                "the attention pattern has global tokens at the end of the row, which moves with each token: "
                "such a row is not generated token by token; set use_cache=False"
            )
        if not heads.causal:
            raise ValueError("earlier tokens of this model see later ones: a cache would be wrong; set use_cache=False")
        if rows is not None and rows.packed:
            raise ValueError("rows of several documents cannot be continued from a cache")
        if rows is None and self._rows is not None:
            raise ValueError(
                "earlier tokens had padding: pass the attention_mask of all tokens, not only of the new ones"
            )
        dropped = self.kept is not None and self.kept.places.shape[1] < self._tokens
        if rows is not None and dropped and not rows.continues(self._rows, self._tokens):
            raise ValueError(
                "the attention_mask hides other earlier tokens than before, by which keys were dropped: start a new "
                "cache, or set use_cache=False"
            )

    def _drop(self) -> None:
        """Drop the keys that no later token sees."""
        assert self.kept is not None
        index, self.kept = self.kept.visible_later(self._rows)
        if index is not None:
            self._room = None
            self.keys, self.values = take_tokens(self.keys, index), take_tokens(self.values, index)
        self._make_room()

    def _make_room(self) -> None:
        """Move the keys to slots with room for more, unless gradients go through them."""
        held = self._held
        if self._room is not None and held < self._room[0].shape[2]:
            return
        self._room = None
        if torch.is_grad_enabled() and (self.keys.requires_grad or self.values.requires_grad):
            return
        room = []
        for part in (self.keys, self.values):
            slots = part.new_empty(*part.shape[:2], slots_for(held), part.shape[3])
            slots[:, :, :held] = part
            room.append(slots)
        self._room = (room[0], room[1])
        self.keys, self.values = (slots[:, :, :held] for slots in room)

    def visible_keys(self) -> tuple[Tensor, Tensor, Tensor]:
        """Drop keys, and return keys and values ``[B, G, K, D]`` with their positions, int64 ``[1 or B, K]``.

        Positions are those of each row without its padding; -1 where a row holds fewer keys than others.
        """
        assert self.kept is not None
        self._drop()
        return self.keys, self.values, self.kept.positions(self._rows)

    def extend(self, key_states: Tensor, value_states: Tensor) -> None:
        """Add keys and values ``[B, G, N, D]`` of tokens without padding that were computed with another cache.

        What no token behind them sees is dropped, and may have any value.
        """
        assert self.kept is not None
        self.update(key_states, value_states)
        rows = self._rows
        if rows is not None:
            more = rows.segments.new_zeros(len(rows.segments), key_states.shape[2])
            rows = Rows.of(torch.cat([rows.segments, more], 1), self._tokens)
        self.settle(self.kept.heads, rows)
        self._drop()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length and the offset of the mask: it covers all tokens, also those that are dropped."""
        return self._tokens + query_length, 0

    def get_seq_length(self) -> int:
        """Return how many tokens have been read."""
        return self._tokens

    def nbytes(self) -> int:
        """Return the bytes of keys and values, with the room for later ones."""
        parts = self._room or (self.keys, self.values)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def activate_past_recording(self) -> None:
        """Drop keys only in ``crop``, so that tokens can be taken back until then."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last ``-tokens_to_remove`` tokens. Raises ``ValueError`` if keys from before them are gone."""
        if tokens_to_remove > 0:
            raise ValueError("crop takes the number of tokens to remove, as a negative number")
        count = -tokens_to_remove
        if not self._tokens:
            return
        if count >= self._tokens:
            if count > self._tokens:
                raise ValueError(f"the cache holds {self._tokens} tokens: {count} cannot be removed")
            recording = self.record_past
            self._forget()
            self.record_past = recording
            return
        if count:
            if self.kept is not None:
                self.kept = self.kept.cropped(count)
            self._tokens -= count
            if self._rows is not None:
                self._rows = self._rows.until(self._tokens)
            held = self._held - count
            self.keys, self.values = self.keys[:, :, :held], self.values[:, :, :held]
        if self.record_past and self.kept is not None:
            self._drop()

    def _of_rows(self, index: Tensor) -> None:
        if not self._tokens:
            return
        index = index.to(self.keys.device)
        held = self._held
        if self._room is None:
            self.keys, self.values = self.keys[index], self.values[index]
        else:
            self._room = (self._room[0][index], self._room[1][index])
            self.keys, self.values = (slots[:, :, :held] for slots in self._room)
        if self.kept is not None:
            self.kept = self.kept.of_rows(index)
        if self._rows is not None:
            self._rows = self._rows.chosen(index)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Choose rows of the batch, for beam search."""
        self._of_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        if self._tokens:
            self._of_rows(torch.arange(len(self.keys), device=self.keys.device).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep chosen rows of the batch, by number or as bool ``[B]``."""
        if self._tokens:
            self._of_rows(torch.arange(len(self.keys), device=self.keys.device)[indices.to(self.keys.device)])

    def _move(self, device: Any) -> None:
        if not self._held:
            return
        held = self._held
        if self._room is None:
            self.keys, self.values = (part.to(device, non_blocking=True) for part in (self.keys, self.values))
        else:
            room = [part.to(device, non_blocking=True) for part in self._room]
            self._room = (room[0], room[1])
            self.keys, self.values = (slots[:, :, :held] for slots in room)

    def offload(self) -> None:
        """Move keys and values to the CPU."""
        self._move("cpu")

    def prefetch(self) -> None:
        """Move keys and values back to their device."""
        if self.is_initialized:
            self._move(self.device)

    def reset(self) -> None:
        """Forget all tokens."""
        self._forget()
