"""A key/value cache with fixed addresses, filled from the cache of a prefill."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from ..toolkit.attention import FixedGroupsLayer, FixedLayer, RingLayer, RingTokens, Slots, serves_rings
from .quantized_cache import QuantizedLayer, StaticQuantizedLayer

# Tokens are read back after the first step, then after this many. Meanwhile as many steps again are launched, so that
# the device does not wait for the host; at most twice as many are computed in vain after the end.
WINDOW = 4


def unsupported_cache(cache: Any) -> str | None:
    """Return why the keys and values of a cache cannot be moved to fixed addresses; None if they can be."""
    if not isinstance(cache, Cache) or not cache.layers:
        return f"the model keeps its state in a {type(cache).__name__}, which has no layers of keys and values"
    for layer in cache.layers:
        if drops_keys(layer) and getattr(layer, "record_past", False):
            return "the cache records its past, so that tokens can be taken back"
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer) and not drops_keys(layer):
            return f"the cache has a {type(layer).__name__}, whose state cannot stay at one address"
    return None


def drops_keys(layer: Any) -> bool:
    """Return True for a layer that holds the keys that a pattern sees, whichever checkpoint brought its class."""
    return (hasattr(layer, "visible_keys") and hasattr(layer, "extend")) or _has_groups(layer)


def parts_of(layer: Any) -> list[Any]:
    """Return what holds the keys that a pattern sees: the layer, or those of its groups of heads; of others nothing."""
    if _has_groups(layer):
        return layer.parts
    return [layer] if drops_keys(layer) else []


def _has_groups(layer: Any) -> bool:
    return hasattr(layer, "fresh") and hasattr(layer, "take")


class StaticKeyValues:
    """Keys and values ``[rows, heads, length, head_dim]`` of each layer at addresses that do not change.

    Layers with a sliding window keep all positions as well: the model's mask leaves out those before the window, and
    the position of a token is a number on the device. (transformers' own static sliding layers count in Python, which
    a captured graph does not see.)

    Args:
        source: the cache of a prefill; gives the number of layers and their shapes.
        rows: rows of the batch, at least those of ``source``.
        length: the most tokens that fit.
    """

    def __init__(self, source: Any, rows: int, length: int) -> None:
        self.rows = rows
        self.length = length
        self._layers: list[Any] = []
        self._slots: dict[Any, Slots] = {}  # of each pattern
        self._ring_tokens: RingTokens | None = None
        for given in source.layers:
            if _has_groups(given) and serves_rings(given, length, 2 * WINDOW):
                self._layers.append(self._in_rings(given))
                continue
            if parts := parts_of(given):
                fixed = [self._in_slots(part) for part in parts]
                self._layers.append(fixed[0] if parts == [given] else FixedGroupsLayer(fixed, given.groups))
                continue
            if isinstance(given, QuantizedLayer):
                self._layers.append(given.static(rows, length))
                continue
            layer = StaticLayer(max_cache_len=length)
            if given.is_initialized:
                keys, values = (t.new_zeros((rows, *t.shape[1:])) for t in (given.keys, given.values))
                layer.lazy_initialization(keys, values)
            self._layers.append(layer)
        self.cache = Cache(layers=self._layers)

    def _in_slots(self, given: Any) -> FixedLayer:
        heads = given.kept.heads
        first = heads not in self._slots
        if first:
            self._slots[heads] = Slots(heads, self.rows, self.length, 2 * WINDOW, given.keys.device)
        return FixedLayer(self._slots[heads], given, self.rows, first)

    def _in_rings(self, given: Any) -> RingLayer:
        first = self._ring_tokens is None
        if self._ring_tokens is None:
            self._ring_tokens = RingTokens(self.rows, given.parts[0].keys.device)
        return RingLayer(given, self._ring_tokens, self.length, 2 * WINDOW, first)

    @property
    def knows_padding(self) -> bool:
        """True if layers know which tokens are padding, so that a step has no mask."""
        return bool(self._slots) or self._ring_tokens is not None

    def fill(self, source: Any, mask: Tensor | None = None) -> int:
        """Copy the keys and values of a prefill, and set the number of tokens; return it.

        Rows beyond those of ``source`` get its first row. Positions after the prefill are set to zero: they are
        masked, but zero times a value that is not finite would still be NaN.

        Args:
            source: the cache of the prefill.
            mask: the ``attention_mask [n, tokens]`` of the prefill; None without padding.
        """
        tokens = int(source.get_seq_length())
        for layer, given in zip(self._layers, source.layers, strict=True):
            if isinstance(layer, RingLayer):
                held = [part.visible_keys() for part in given.parts]
                layer.load(held)
                if layer.first:
                    layer.tokens.load(self._all_rows(_counted(held[0][2], len(held[0][0]), tokens, mask)))
                continue
            if parts := _fixed(layer):
                for part, held in zip(parts, parts_of(given), strict=True):
                    keys, values, positions = held.visible_keys()
                    part.load(keys, values)
                    if part.first:
                        count = _counted(positions, len(keys), tokens, mask)
                        part.slots.load(*(self._all_rows(each) for each in (positions.expand(len(keys), -1), count)))
                continue
            if not given.is_initialized:
                continue
            if isinstance(layer, StaticQuantizedLayer):
                layer.load(given)
                continue
            for mine, theirs in ((layer.keys, given.keys), (layer.values, given.values)):
                kept = theirs.shape[-2]  # fewer than ``tokens`` under a sliding window
                mine.zero_()
                mine[: theirs.shape[0], :, tokens - kept : tokens].copy_(theirs)
                mine[theirs.shape[0] :, :, tokens - kept : tokens].copy_(theirs[:1])
        self.set_tokens(tokens)
        return tokens

    def _all_rows(self, part: Tensor) -> Tensor:
        return torch.cat([part, part[:1].expand(self.rows - len(part), *part.shape[1:])])

    def set_tokens(self, tokens: int) -> None:
        """Set the number of tokens that layers without a pattern hold."""
        for layer in self._layers:
            if isinstance(layer, StaticQuantizedLayer):
                layer.set_tokens(tokens)
            elif not _fixed(layer) and not isinstance(layer, RingLayer):
                layer.cumulative_length.fill_(tokens)

    def mark(self) -> Callable[[], None]:
        """Return a function that takes back the steps from now on, a few at most."""
        tokens = int(self.cache.get_seq_length())
        shared: list[Any] = [*self._slots.values(), *([] if self._ring_tokens is None else [self._ring_tokens])]
        changed = [part for each in shared for part in each.state()]
        before = [part.clone() for part in changed]

        def put_back() -> None:
            # What a step has written behind the tokens is overwritten by the next.
            self.set_tokens(tokens)
            for part, kept in zip(changed, before, strict=True):
                part.copy_(kept)

        return put_back

    def append_to(self, target: Any, first: int, tokens: int) -> None:
        """Append the keys and values of positions ``first`` to ``tokens`` to the cache of the prefill."""
        if first >= tokens:
            return
        for index, (layer, theirs) in enumerate(zip(self._layers, target.layers, strict=True)):
            if isinstance(layer, StaticQuantizedLayer):
                layer.unload(theirs, tokens)
            elif isinstance(layer, RingLayer):
                for held, (keys, values) in zip(theirs.parts, layer.first_tokens(tokens - first), strict=True):
                    held.extend(keys[: len(held.keys)], values[: len(held.keys)])
            elif parts := _fixed(layer):
                for part, held in zip(parts, parts_of(theirs), strict=True):
                    rows = len(held.keys)
                    keys, values = part.first_tokens(tokens - first)
                    held.extend(keys[:rows], values[:rows])
            elif theirs.is_initialized:
                rows = theirs.keys.shape[0]
                keys, values = (t[:rows, :, first:tokens].clone() for t in (layer.keys, layer.values))
                target.update(keys, values, index)


def _counted(like: Tensor, rows: int, tokens: int, mask: Tensor | None) -> Tensor:
    """Return the tokens of each row without its padding, int64 ``[rows]``."""
    return like.new_full((rows,), tokens) if mask is None else mask.sum(1)


def _fixed(layer: Any) -> list[FixedLayer]:
    """Return the layers in slots that a layer is or has."""
    if isinstance(layer, FixedGroupsLayer):
        return layer.parts
    return [layer] if isinstance(layer, FixedLayer) else []


def next_logits(outputs: Any) -> Tensor:
    """Return the logits of the last position ``[rows, V]``, float32."""
    return outputs.logits[:, -1].to(dtype=torch.float32)
