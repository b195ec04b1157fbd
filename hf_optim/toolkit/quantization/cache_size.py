"""What a decoder keeps of each token, and the bytes of its key/value cache."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ...errors import ModelError
from ...trust.bounds import first_line, shown
from .key_values import KeyValueScheme

if TYPE_CHECKING:
    from ..attention import HeadPatterns

# Heads with more channels are kept in full precision.
WIDEST_HEAD = 256
# Slots of the tail behind the residual tokens and the group that waits: a step that is tried writes there.
SPARE_SLOTS = 16
# Tokens for which it is tried whether a pattern drops keys.
LONGEST_TRIED = 2**17


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of each token.

    Attributes:
        heads: of keys and values.
        key_dim, value_dim: numbers of a head.
        window: the most tokens that the layer attends to; None for all.
        patterns: of sparse attention; None for a layer without.
        drops: the patterns let the layer drop keys.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None
    patterns: HeadPatterns | None = None
    drops: bool = False

    def tokens(self, length: int) -> int:
        """Return the tokens that a row of ``length`` has room for, in full precision.

        Under a pattern, this is the most at any time up to ``length``.
        """
        if self.patterns is not None:
            from ..attention import slots_for, tokens_kept

            return slots_for(tokens_kept(self.patterns, length))
        return length if self.window is None else min(length, self.window - 1)

    def takes(self, scheme: KeyValueScheme | None) -> bool:
        """Return True if the layer is quantized: it keeps all tokens, with heads that the kernels take."""
        if scheme is None or self.window is not None or self.drops:
            return False
        return max(self.key_dim, self.value_dim) <= WIDEST_HEAD


def cache_layers(config: Any) -> list[CacheLayer]:
    """Return the layers of a decoder's cache, from its configuration.

    A layer that uses the keys and values of another is left out. Raises ``ModelError`` for encoder-decoders, for layers
    with a recurrent state, and for multi-head latent attention, which keeps what keys and values are computed from.
    """
    from transformers import DynamicCache

    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{config.model_type} has an encoder, whose keys and values are kept as well: not counted")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(f"{text.model_type} has multi-head latent attention, which keeps no keys and values of heads")
    heads = getattr(text, "num_attention_heads", None) or getattr(text, "n_head", None)
    width = getattr(text, "hidden_size", None)
    if not isinstance(heads, int) or not isinstance(width, int) or heads < 1:
        raise ModelError(f"{text.model_type} does not say how many attention heads it has")
    shared = getattr(text, "num_key_value_heads", None) or heads
    if getattr(text, "multi_query", False):
        shared = 1
    size = getattr(text, "head_dim", None) or width // heads
    try:
        kept = DynamicCache(config=text).layers
    except Exception as error:  # whatever a value of the configuration led to
        raise ModelError(f"transformers makes no cache for {text.model_type}: {first_line(error)}") from error
    patterns, drops = layer_patterns(text)
    count = getattr(text, "num_hidden_layers", 0)
    names = [type(layer).__name__ for layer in kept] or ["DynamicLayer"] * count
    windows = [getattr(layer, "sliding_window", None) for layer in kept] or [None] * count
    # Layers that reuse the cache of an earlier one (Gemma 3n) come last.
    count -= int(getattr(text, "num_kv_shared_layers", 0) or 0)
    found = []
    for number, (name, window) in list(enumerate(zip(names, windows, strict=True)))[:count]:
        if name == "DummyLayer":
            continue
        if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise ModelError(f"{text.model_type} keeps a {name}, not keys and values of tokens")
        if patterns is not None:
            found.append(CacheLayer(shared, size, size, None, patterns[number], drops[number]))
            continue
        found.append(CacheLayer(shared, size, size, window if isinstance(window, int) else None))
    if not found:
        raise ModelError(f"{text.model_type} keeps no keys and values")
    return found


def layer_patterns(config: Any) -> tuple[list[HeadPatterns] | None, list[bool]]:
    """Return the patterns of each layer, and True where they let it drop keys before the context is full.

    None and an empty list for a model without a pattern. Raises ``ModelError`` for settings that make none.
    """
    from ..attention import patterns_of, tokens_kept

    try:
        patterns = patterns_of(config)
        if patterns is None:
            return None, []
        length = min(int(getattr(config, "max_position_embeddings", 0) or LONGEST_TRIED), LONGEST_TRIED)
        return patterns, [tokens_kept(each, length) < length for each in patterns]
    except ValueError as error:
        raise ModelError(first_line(error)) from error


@dataclass(frozen=True)
class CacheSize:
    """The bytes of a cache.

    Attributes:
        codes: of packed codes.
        scales: of scales and zero points.
        plain: of tokens in full precision: the tail, layers with a window, or all of it.
    """

    codes: int
    scales: int
    plain: int

    @property
    def total(self) -> int:
        """All bytes."""
        return self.codes + self.scales + self.plain


def cache_size(
    config: Any, batch: int, length: int, scheme: KeyValueScheme | None = None, dtype_bytes: int = 2
) -> CacheSize:
    """Return the bytes of the cache of ``batch`` sequences of ``length`` tokens.

        16 bits:    batch * length * sum over layers of heads * (key_dim + value_dim) * 2

    With a scheme, codes, float32 scales and zero points, and the buffer of the tail are counted; heads are stored with
    a power of two of channels. Layers with a window or a pattern of attention keep what it sees, in full precision.

    Args:
        config: the configuration of a model, or a list of ``CacheLayer``.
        batch, length: positive.
        scheme: None for a cache that is not quantized.
        dtype_bytes: of a number in full precision.

    Raises ``ModelError`` as ``cache_layers`` does, and for sizes that are not positive.
    """
    for name, value in (("batch", batch), ("length", length), ("dtype_bytes", dtype_bytes)):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 2**40:
            raise ModelError(f"{name} must be a positive number, not {shown(value)}")
    if not isinstance(config, (list, tuple)) and not hasattr(config, "get_text_config"):
        raise ModelError(
            f"pass the configuration of a model (model.config), not a value of type {type(config).__name__}"
        )
    layers = config if isinstance(config, (list, tuple)) else cache_layers(config)
    codes = scales = plain = 0
    for layer in layers:
        channels = layer.key_dim + layer.value_dim
        if scheme is None or not layer.takes(scheme):
            plain += layer.tokens(length) * layer.heads * channels * dtype_bytes
            continue
        tokens = scheme.quantized_tokens(length)
        key, value = stored_channels(layer.key_dim), stored_channels(layer.value_dim)
        codes += tokens * layer.heads * (key + value) * scheme.width // 8
        numbers = 4 if scheme.is_symmetric else 8
        per_key = tokens if scheme.keys == "token" else tokens // scheme.group * key
        scales += numbers * layer.heads * (per_key + tokens)
        plain += tail_slots(scheme) * layer.heads * channels * dtype_bytes
    return CacheSize(batch * codes, batch * scales, batch * plain)


def tail_slots(scheme: KeyValueScheme) -> int:
    """Return the tokens that the buffer of the tail has room for."""
    return scheme.residual + scheme.step + SPARE_SLOTS


def stored_channels(channels: int) -> int:
    """Return the channels that are stored for the codes of a head: a power of two, at least 16."""
    return max(16, 2 ** math.ceil(math.log2(channels)))
