"""The quantization of keys and values: its settings, where a model keeps them, and the bytes that a cache takes.

A model's setting is the entry ``hf_optim_key_values`` of its configuration. It changes no weight, and stock transformers
ignores it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ...errors import ModelError, RecipeError
from ...trust.bounds import shown

SETTING = "hf_optim_key_values"
BITS = (4, 8, "float8")
KEYS = ("channel", "token")
GROUPS = (32, 64, 128)
LONGEST_RESIDUAL = 4096
# Tokens that are quantized at once where no group says so.
TOKEN_STEP = 64
# Heads with more channels than this are kept in 16 bits.
WIDEST_HEAD = 256


@dataclass(frozen=True)
class KeyValueScheme:
    """How keys and values are quantized.

    Attributes:
        bits: 4, 8, or ``"float8"`` (e4m3).
        keys: ``"channel"`` gives each channel of ``group`` consecutive tokens a scale (KIVI), ``"token"`` each token and
            head. Values always have one for each token and head.
        group: 32, 64 or 128 tokens.
        residual: the latest tokens that stay in full precision; up to ``group`` more wait until their group is full.
        symmetric: no zero points; None is False with 4 bits and True otherwise.

    Raises ``RecipeError`` for other values.
    """

    bits: int | str = 8
    keys: str = "channel"
    group: int = 64
    residual: int = 128
    symmetric: bool | None = None

    def __post_init__(self) -> None:
        for name, choices in (("bits", BITS), ("keys", KEYS), ("group", GROUPS)):
            value = getattr(self, name)
            if isinstance(value, bool) or value not in choices:
                raise RecipeError(f"{name} must be one of {', '.join(map(repr, choices))}, not {shown(value)}")
        kept = self.residual
        if isinstance(kept, bool) or not isinstance(kept, int) or not 0 <= kept <= LONGEST_RESIDUAL:
            raise RecipeError(f"residual must be a number of tokens up to {LONGEST_RESIDUAL}, not {shown(kept)}")
        if self.symmetric not in (None, True, False):
            raise RecipeError(f"symmetric must be True, False or None, not {shown(self.symmetric)}")
        if self.bits == "float8" and self.symmetric is False:
            raise RecipeError("float8 has no zero points: leave symmetric out")

    @property
    def width(self) -> int:
        """Bits of a code."""
        return 8 if self.bits == "float8" else int(self.bits)

    @property
    def is_symmetric(self) -> bool:
        """True without zero points."""
        return self.bits != 4 if self.symmetric is None else self.symmetric

    @property
    def step(self) -> int:
        """Tokens that are quantized at once."""
        return TOKEN_STEP if self.keys == "token" else self.group

    def quantized_tokens(self, tokens: int) -> int:
        """Return how many of the first ``tokens`` are quantized; the rest are in full precision."""
        return max(0, (tokens - self.residual) // self.step * self.step)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, for a configuration."""
        return asdict(self)


def scheme_of(config: Any) -> KeyValueScheme | None:
    """Return the scheme in the configuration of a model (or of its text part); None if there is none.

    Raises ``ModelError`` for an entry that is not one.
    """
    found = getattr(config.get_text_config(decoder=True), SETTING, None)
    if found is None:
        return None
    known = [field.name for field in fields(KeyValueScheme)]
    if not isinstance(found, Mapping):
        raise ModelError(f"{SETTING} in the configuration is {shown(found)}, not a mapping with {', '.join(known)}")
    unknown = sorted(str(key) for key in found if key not in known)
    if unknown:
        raise ModelError(f"{SETTING} in the configuration has {shown(unknown[0])}; it has {', '.join(known)}")
    try:
        return KeyValueScheme(**found)
    except RecipeError as error:
        raise ModelError(f"{SETTING} in the configuration: {error}") from error


def set_scheme(config: Any, scheme: KeyValueScheme | None) -> None:
    """Write a scheme into the configuration of a model, or remove it."""
    own = config.get_text_config(decoder=True)
    if scheme is not None:
        setattr(own, SETTING, scheme.to_dict())
    elif hasattr(own, SETTING):
        delattr(own, SETTING)


@dataclass(frozen=True)
class CacheLayer:
    """What one layer keeps of each token.

    Attributes:
        heads: of keys and values.
        key_dim, value_dim: numbers of a head.
        window: the most tokens that the layer attends to; None for all.
    """

    heads: int
    key_dim: int
    value_dim: int
    window: int | None = None

    def takes(self, scheme: KeyValueScheme | None) -> bool:
        """Return True if the layer is quantized: it attends to all tokens, with heads that the kernels take."""
        return scheme is not None and self.window is None and max(self.key_dim, self.value_dim) <= WIDEST_HEAD


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
        raise ModelError(f"transformers makes no cache for {text.model_type}: {shown(str(error))}") from error
    count = getattr(text, "num_hidden_layers", 0)
    names = [type(layer).__name__ for layer in kept] or ["DynamicLayer"] * count
    windows = [getattr(layer, "sliding_window", None) for layer in kept] or [None] * count
    # Layers that reuse the cache of an earlier one (Gemma 3n) come last.
    count -= int(getattr(text, "num_kv_shared_layers", 0) or 0)
    found = []
    for name, window in list(zip(names, windows, strict=True))[:count]:
        if name == "DummyLayer":
            continue
        if name not in ("DynamicLayer", "DynamicSlidingWindowLayer"):
            raise ModelError(f"{text.model_type} keeps a {name}, not keys and values of tokens")
        found.append(CacheLayer(shared, size, size, window if isinstance(window, int) else None))
    if not found:
        raise ModelError(f"{text.model_type} keeps no keys and values")
    return found


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
    a power of two of channels. Layers with a window keep its tokens, in full precision.

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
    layers = config if isinstance(config, (list, tuple)) else cache_layers(config)
    codes = scales = plain = 0
    for layer in layers:
        channels = layer.key_dim + layer.value_dim
        if scheme is None or not layer.takes(scheme):
            kept = length if layer.window is None else min(length, layer.window - 1)
            plain += kept * layer.heads * channels * dtype_bytes
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


# Slots of the tail behind the residual tokens and the group that waits: a step that is tried writes there.
SPARE_SLOTS = 16
