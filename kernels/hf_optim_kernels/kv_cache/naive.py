"""The specification: quantize, store, decode, and attend to a quantized cache, in PyTorch.

A vector ``x`` (the values of a token and head; the keys of one, or a channel of ``group`` tokens) has the codes

    symmetric:   scale = max |x| / (2^(bits-1) - 1),      code = round(x / scale) + offset
    asymmetric:  scale = (max x - min x) / (2^bits - 1),  code = round((x - min x) / scale)
    float8:      scale = max |x| / 448,                   code = e4m3(x / scale)

and the values ``scale * (code - offset) + zero``, ``offset = 2^(bits-1)``, or 0 for four asymmetric bits,
``zero = min x + offset * scale`` (0 if symmetric); ``scale * code`` for float8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..decode_attention import naive as dense
from .format import FLOAT8_MAX, TINY, Format, Store, padded


def quantize(x: Tensor, dim: int | tuple[int, ...], fmt: Format) -> tuple[Tensor, Tensor, Tensor]:
    """Return codes (int32, the shape of ``x``), scales and zeros (float32, ``dim`` kept with size 1)."""
    x = x.float()
    if fmt.float8 or fmt.symmetric:
        largest = FLOAT8_MAX if fmt.float8 else fmt.offset - 1
        scale = _divided(x.abs().amax(dim, keepdim=True), largest).clamp_min(TINY)
        zero = torch.zeros_like(scale)
        if fmt.float8:
            numbers = (x / scale).clamp(-FLOAT8_MAX, FLOAT8_MAX).to(torch.float8_e4m3fn)
            return numbers.view(torch.uint8).int(), scale, zero
        return (x / scale).round().clamp(-largest, largest).int() + fmt.offset, scale, zero
    low, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
    levels = (1 << fmt.bits) - 1
    scale = _divided(high - low, levels).clamp_min(TINY)
    codes = ((x - low) / scale).round().clamp(0, levels).int()
    return codes, scale, low + fmt.offset * scale


def _divided(x: Tensor, by: float) -> Tensor:
    # By a tensor: on CUDA, PyTorch multiplies by the reciprocal of a number, which rounds otherwise.
    return x / torch.full_like(x, by)


def decode(codes: Tensor, scale: Tensor, zero: Tensor | None, fmt: Format) -> Tensor:
    """Return the float32 values of codes; ``scale`` and ``zero`` broadcast to them."""
    if fmt.float8:
        return codes.to(torch.uint8).view(torch.float8_e4m3fn).float() * scale
    values = (codes - fmt.offset).float() * scale
    return values if zero is None or zero.numel() == 0 else values + zero


def write(store: Store, fmt: Format, first: int, key: Tensor, value: Tensor) -> None:
    """Quantize the tokens from ``first`` on into a store.

    Args:
        first: their first position, a multiple of ``fmt.step``.
        key, value: ``[B, G, T, D]`` and ``[B, G, T, Dv]``, T a multiple of ``fmt.step``.
    """
    B, G, T, D = key.shape
    dv = value.shape[-1]
    if T == 0:
        return
    if fmt.per_token:
        codes, scale, zero = quantize(key, -1, fmt)
        where, scale, zero = slice(first, first + T), scale[..., 0], zero[..., 0]
        store.key_scale[:, :, where] = scale
        if not fmt.symmetric:
            store.key_zero[:, :, where] = zero
    else:
        codes, scale, zero = quantize(key.unflatten(2, (T // fmt.group, fmt.group)), 3, fmt)
        where = slice(first // fmt.group, (first + T) // fmt.group)
        store.key_scale[:, :, where, :D] = scale[:, :, :, 0]
        if not fmt.symmetric:
            store.key_zero[:, :, where, :D] = zero[:, :, :, 0]
    blocks = T // fmt.sub
    _pack(store.key_words, codes.reshape(B, G, blocks, fmt.sub, D), first, fmt, D, transposed=False)
    codes, scale, zero = quantize(value, -1, fmt)
    store.value_scale[:, :, first : first + T] = scale[..., 0]
    if not fmt.symmetric:
        store.value_zero[:, :, first : first + T] = zero[..., 0]
    _pack(store.value_words, codes.reshape(B, G, blocks, fmt.sub, dv), first, fmt, dv, transposed=True)


def _pack(words: Tensor, codes: Tensor, first: int, fmt: Format, channels: int, transposed: bool) -> None:
    """Put the codes ``[B, G, blocks, sub, channels]`` of consecutive sub-blocks into their words."""
    if transposed:
        codes = codes.transpose(3, 4)
    at = first // fmt.sub
    for place in range(fmt.per_word):
        start = (place - at) % fmt.per_word  # the first of these sub-blocks that has this place in its word
        mine = codes[:, :, start :: fmt.per_word]
        if mine.shape[2] == 0:
            continue
        tile = (at + start) // fmt.per_word
        shift = place * fmt.bits
        target = words[:, :, tile : tile + mine.shape[2]]
        target = target[..., :channels, :] if transposed else target[..., :channels]
        kept = target.int() & ~(((1 << fmt.bits) - 1) << shift)
        target.copy_((kept | (mine << shift)).to(torch.int16))


def codes_of(words: Tensor, fmt: Format, tokens: int, channels: int, transposed: bool) -> Tensor:
    """Return the codes ``[B, G, tokens, channels]`` (int32) of the first tokens."""
    if transposed:
        words = words.transpose(3, 4)
    tiles = -(-tokens // fmt.tile)
    wide = words[:, :, :tiles, :, :channels].int()
    mask = (1 << fmt.bits) - 1
    parts = [(wide >> (place * fmt.bits)) & mask for place in range(fmt.per_word)]
    return torch.stack(parts, dim=3).flatten(2, 4)[:, :, :tokens]


def read(store: Store, fmt: Format, tokens: int, quantized: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values of the first ``tokens``, in the dtype of the tail; ``quantized`` of them have codes.

    Shapes ``[B, G, tokens, D]`` and ``[B, G, tokens, Dv]``.
    """
    d, dv = store.tail_keys.shape[-1], store.tail_values.shape[-1]
    codes = codes_of(store.key_words, fmt, quantized, d, transposed=False)
    if fmt.per_token:
        scale, zero = (t[:, :, :quantized, None] for t in (store.key_scale, store.key_zero))
    else:
        groups = quantized // fmt.group
        scale, zero = (
            t[:, :, :groups, :d].repeat_interleave(fmt.group, dim=2) if t.numel() else t
            for t in (store.key_scale, store.key_zero)
        )
    key = decode(codes, scale, None if fmt.symmetric else zero, fmt)
    codes = codes_of(store.value_words, fmt, quantized, dv, transposed=True)
    scale, zero = (t[:, :, :quantized, None] for t in (store.value_scale, store.value_zero))
    value = decode(codes, scale, None if fmt.symmetric else zero, fmt)
    slots = torch.arange(quantized, tokens, device=key.device) % fmt.ring
    parts = ((key, store.tail_keys), (value, store.tail_values))
    key, value = (torch.cat([old.to(tail.dtype), tail[:, :, slots]], dim=2) for old, tail in parts)
    return key, value


def append(store: Store, fmt: Format, tokens: int, quantized: int, key: Tensor, value: Tensor) -> int:
    """Write tokens after the first ``tokens``, quantize the steps that are due, and return how many have codes then.

    Args:
        store: with room for them.
        tokens, quantized: what the store holds.
        key, value: ``[B, G, T, D]`` and ``[B, G, T, Dv]``.
    """
    T = key.shape[2]
    due = fmt.quantized(tokens + T, quantized)
    if due > quantized:
        # The tokens to quantize are in the tail, then in what is given.
        old = slice(quantized, min(tokens, due))
        slots = torch.arange(old.start, old.stop, device=key.device) % fmt.ring
        given = max(0, due - tokens)
        write(
            store, fmt, quantized, torch.cat([store.tail_keys[:, :, slots], key[:, :, :given]], dim=2),
            torch.cat([store.tail_values[:, :, slots], value[:, :, :given]], dim=2),
        )  # fmt: skip
    first = max(tokens, due)
    slots = torch.arange(first, tokens + T, device=key.device) % fmt.ring
    store.tail_keys[:, :, slots] = key[:, :, first - tokens :]
    store.tail_values[:, :, slots] = value[:, :, first - tokens :]
    return due


def attend(
    query: Tensor, store: Store, fmt: Format, tokens: int, quantized: int, mask: Tensor | None, sinks: Tensor | None,
    scale: float, softcap: float,
) -> Tensor:  # fmt: skip
    """Return the attention ``[B, Q, H, Dv]`` of ``query`` to a store; arguments as of ``decode_attention.naive``.

    ``mask`` may have columns for positions after ``tokens``, which are not read.
    """
    key, value = read(store, fmt, tokens, quantized)
    mask = mask if mask is None else mask[..., :tokens]
    return dense.decode_attention(query, key, value, mask, None, sinks, scale, softcap)


__all__ = ["append", "attend", "codes_of", "decode", "padded", "quantize", "read", "write"]
