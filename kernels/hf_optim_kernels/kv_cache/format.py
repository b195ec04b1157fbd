"""How a quantized cache is laid out: its numbers, and the tensors that hold them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Tokens that share a word's place: the rows that a tensor core multiplies at once.
SUB = 16
# Tokens that are quantized at once if each has its own scale.
STEP = 64
# Slots of the tail that no token needs: steps that are tried, then taken back, write there.
SPARE = 16
# A scale is at least this, so that a vector of zeros has one.
TINY = 2.0**-60
# float8 e4m3: its largest number.
FLOAT8_MAX = 448.0


class Format(NamedTuple):
    """The layout of the codes of one layer.

    Attributes:
        bits: 4 or 8.
        float8: codes are float8 (e4m3) numbers, of 8 bits; symmetric.
        per_token: keys have a scale for each token and head; otherwise for each channel of ``group`` tokens.
        group: tokens that share the scales of the keys' channels.
        residual: the latest tokens that are always in full precision.
        symmetric: without zero points.
    """

    bits: int
    float8: bool
    per_token: bool
    group: int
    residual: int
    symmetric: bool

    @property
    def per_word(self) -> int:
        """Codes of an int16 word; each belongs to another sub-block of its tile."""
        return 16 // self.bits

    @property
    def sub(self) -> int:
        """Tokens of a sub-block."""
        return SUB

    @property
    def step(self) -> int:
        """Tokens that are quantized at once."""
        return STEP if self.per_token else self.group

    @property
    def tile(self) -> int:
        """Tokens of a tile of words."""
        return self.per_word * self.sub

    @property
    def ring(self) -> int:
        """Tokens that fit into the tail: position ``t`` is in its slot ``t % ring``."""
        return self.residual + self.step + SPARE

    @property
    def offset(self) -> int:
        """The code of ``zero``: a value is ``scale * (code - offset) + zero``. float8 codes have none.

        With zero points, four bits have 0: the kernel then has no sum of an offset to take back. (The rounding of a
        channel's scaled query, or of a weight, is multiplied by a code less the offset: of eight bits, half of them.)
        """
        return 0 if self.bits == 4 and not self.symmetric else 1 << (self.bits - 1)

    def quantized(self, tokens: int, before: int = 0) -> int:
        """Return how many of ``tokens`` are quantized, ``before`` of them already: whole steps, from the first on."""
        return max(before, (tokens - self.residual) // self.step * self.step, 0)


class Store(NamedTuple):
    """The tensors of one layer, contiguous; B rows, G key heads, D and Dv channels padded to powers of two.

    Attributes:
        key_words: int16 ``[B, G, tiles, sub, D]``; code i of a word belongs to token ``i * sub`` + its row.
        key_scale, key_zero: float32 ``[B, G, groups, D]``, or ``[B, G, tokens]`` per token.
        value_words: int16 ``[B, G, tiles, Dv, sub]``.
        value_scale, value_zero: float32 ``[B, G, tokens]``.
        tail_keys, tail_values: ``[B, G, ring, D]`` and ``[B, G, ring, Dv]``, not padded, in the model's dtype.

    Zero points are empty for a symmetric format.
    """

    key_words: Tensor
    key_scale: Tensor
    key_zero: Tensor
    value_words: Tensor
    value_scale: Tensor
    value_zero: Tensor
    tail_keys: Tensor
    tail_values: Tensor


def padded(channels: int) -> int:
    """Return the channels that are stored for ``channels``: a power of two, at least 16."""
    return max(16, 1 << (channels - 1).bit_length())


def allocate(fmt: Format, key: Tensor, value: Tensor, tokens: int) -> Store:
    """Return an empty store for at least ``tokens``, for the rows, heads and dtype of ``key`` and ``value``.

    Args:
        key, value: ``[B, G, any, D]`` and ``[B, G, any, Dv]``.
    """
    rows, heads = key.shape[:2]
    d, dv = padded(key.shape[-1]), padded(value.shape[-1])
    tiles = max(1, -(-tokens // fmt.tile))
    kept = tiles * fmt.tile
    scales = (kept,) if fmt.per_token else (kept // fmt.group, d)

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros((rows, heads, *shape), dtype=dtype, device=key.device)

    def zero_points(*shape: int) -> Tensor:
        return zeros(*shape) if not fmt.symmetric else zeros(0)

    return Store(
        zeros(tiles, fmt.sub, d, dtype=torch.int16), zeros(*scales), zero_points(*scales),
        zeros(tiles, dv, fmt.sub, dtype=torch.int16), zeros(kept), zero_points(kept),
        zeros(fmt.ring, key.shape[-1], dtype=key.dtype), zeros(fmt.ring, value.shape[-1], dtype=value.dtype),
    )  # fmt: skip


def capacity(store: Store, fmt: Format) -> int:
    """Return the tokens whose codes fit into a store."""
    return store.key_words.shape[2] * fmt.tile
