"""A key/value cache with fixed addresses, filled from the cache of a prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer, StaticLayer

from .quantized_cache import QuantizedLayer, StaticQuantizedLayer


def unsupported_cache(cache: Any) -> str | None:
    """Return why the keys and values of a cache cannot be moved to fixed addresses; None if they can be."""
    if not isinstance(cache, Cache) or not cache.layers:
        return f"the model keeps its state in a {type(cache).__name__}, which has no layers of keys and values"
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, QuantizedLayer):
            return f"the cache has a {type(layer).__name__}, whose state cannot stay at one address"
    return None


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
        for given in source.layers:
            if isinstance(given, QuantizedLayer):
                self._layers.append(given.static(rows, length))
                continue
            layer = StaticLayer(max_cache_len=length)
            if given.is_initialized:
                keys, values = (t.new_zeros((rows, *t.shape[1:])) for t in (given.keys, given.values))
                layer.lazy_initialization(keys, values)
            self._layers.append(layer)
        self.cache = Cache(layers=self._layers)

    def fill(self, source: Any) -> int:
        """Copy the keys and values of a prefill, and set the number of tokens; return it.

        Rows beyond those of ``source`` get its first row. Positions after the prefill are set to zero: they are
        masked, but zero times a value that is not finite would still be NaN.
        """
        tokens = int(source.get_seq_length())
        for layer, given in zip(self._layers, source.layers, strict=True):
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

    def set_tokens(self, tokens: int) -> None:
        """Set the number of tokens that the cache holds."""
        for layer in self._layers:
            if isinstance(layer, StaticQuantizedLayer):
                layer.set_tokens(tokens)
            else:
                layer.cumulative_length.fill_(tokens)

    def append_to(self, target: Any, first: int, tokens: int) -> None:
        """Append the keys and values of positions ``first`` to ``tokens`` to the cache of the prefill."""
        if first >= tokens:
            return
        for index, (layer, theirs) in enumerate(zip(self._layers, target.layers, strict=True)):
            if isinstance(layer, StaticQuantizedLayer):
                layer.unload(theirs, tokens)
            elif theirs.is_initialized:
                rows = theirs.keys.shape[0]
                keys, values = (t[:rows, :, first:tokens].clone() for t in (layer.keys, layer.values))
                target.update(keys, values, index)


def next_logits(outputs: Any) -> Tensor:
    """Return the logits of the last position ``[rows, V]``, float32."""
    return outputs.logits[:, -1].to(dtype=torch.float32)
