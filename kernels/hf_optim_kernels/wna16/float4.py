"""Weights of 4-bit floats (e2m1) for the kernels of ``hf_optim::wna16``: NVFP4 and MXFP4.

An e2m1 pattern ``s e e m`` is the number ``(-1)^s * (0, 0.5, 1, 1.5, 2, 3, 4, 6)[eem]``. Scales are bytes: e4m3 in
groups of 16 columns, divided by a float32 number of the row (NVFP4), or e8m0, a power of two, in groups of 32 (MXFP4).
Columns are packed as codes of integers are (``naive.pack``), in slices of 64: a 16-bit word has a pattern of each of
four slices. The bits of a pattern lie where few instructions bring them to the sign, the exponent and the mantissa of a
bfloat16 number:

    bit        15  14  13  12  11-9  8-6  5-3  2-0
    of slice    0   2   3   1     3    0    1    2       single bits: the sign; three bits: e e m

The scales of a k-tile (256 columns) and a row lie together, as 32-bit words: byte ``s`` of word ``q`` belongs to the
group of columns ``q`` of slice ``s``. A program reads those of its rows as one block, and a word serves all slices.
Bytes of e4m3 are stored with one more bit of exponent instead of the sign: ``(1 + m / 8) 2^(e - 22)`` for ``eeeeemmm``,
and zero for 0. Then no scale is a subnormal number, and the same bits are the upper ones of a bfloat16 or float16
number.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The kinds of numbers of a packed weight: integers on a grid, and 4-bit floats with the scales of one of two formats.
INTEGER, NVFP4, MXFP4 = 0, 1, 2
NAMES = ("integers", "NVFP4", "MXFP4")
GROUPS = {NVFP4: 16, MXFP4: 32}
# Where a slice has the low bit of ``eem``, and its sign.
MAGNITUDE_AT, SIGN_AT = (6, 3, 0, 9), (15, 12, 14, 13)
# Columns that are stored in the same places of a k-tile's words.
SLICE = 64
# What the products of the kernels with NVFP4 are multiplied with, besides the divisors.
FACTOR = 128.0
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu


def format_of(scale: Tensor | None) -> int:
    """Return the kind of numbers that have scales of this dtype (see ``Codes.scale``)."""
    return {E4M3: NVFP4, E8M0: MXFP4}.get(scale.dtype, INTEGER) if scale is not None else INTEGER


def place_bits(patterns: Tensor, index: int) -> Tensor:
    """Return int32 words with the bits of patterns (integers in [0, 16)) at the places of slice ``index``."""
    wide = patterns.to(torch.int32)
    return ((wide & 7) << MAGNITUDE_AT[index]) | ((wide >> 3) << SIGN_AT[index])


def take_bits(words: Tensor, index: int) -> Tensor:
    """Return the patterns of slice ``index`` of int32 words in [0, 2^16)."""
    return ((words >> MAGNITUDE_AT[index]) & 7) | (((words >> SIGN_AT[index]) & 1) << 3)


def without_signs(patterns: Tensor, scale: Tensor, format: int) -> tuple[Tensor, Tensor]:
    """Return patterns [out, in] and bytes of scales [out, groups] of the same weight, whose scales have no sign."""
    if format != NVFP4 or not bool((scale & 128).any()):
        return patterns, scale
    flipped = ((scale & 128) >> 4).repeat_interleave(GROUPS[format], dim=1)[:, : patterns.shape[1]]
    return patterns ^ flipped, scale & 127


def pack_scales(scale: Tensor, format: int) -> Tensor:
    """Return int32 words [k-tiles, out, words] of scales: bytes [out, groups] (uint8) without a sign."""
    rows, per_slice = scale.shape[0], SLICE // GROUPS[format]
    if format == NVFP4:
        scale = _wider_exponents(scale.device)[scale.long()]
    scale = torch.nn.functional.pad(scale, (0, -scale.shape[1] % (4 * per_slice)))
    places = scale.view(rows, -1, 4, per_slice).permute(1, 0, 3, 2).contiguous()
    return places.view(torch.int32).squeeze(-1)


def unpack_scales(words: Tensor, format: int, groups: int) -> Tensor:
    """Return the bytes [out, groups] (uint8) of ``pack_scales``."""
    places = words.contiguous().view(torch.uint8).view(*words.shape, 4)
    scale = places.permute(1, 0, 3, 2).reshape(words.shape[1], -1)[:, :groups].contiguous()
    if format == NVFP4:
        found = _wider_exponents(scale.device)
        back = torch.zeros(256, dtype=torch.uint8, device=scale.device)
        back[found.long()] = torch.arange(128, dtype=torch.uint8, device=scale.device)
        scale = back[scale.long()]
    return scale


def _wider_exponents(device: torch.device) -> Tensor:
    """Return the stored byte of each positive e4m3 byte: uint8 [128]."""
    value = torch.arange(128, dtype=torch.uint8).view(E4M3).to(torch.float32)
    fraction, exponent = torch.frexp(value)  # the fraction is in [0.5, 1)
    found = ((exponent + 21) << 3) | ((fraction * 16).to(torch.int32) - 8)
    found = torch.where(value == 0, 0, torch.where(value.isnan(), 255, found))
    return found.to(torch.uint8).to(device)


def numbers(patterns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of patterns, integers in [0, 16), in a floating dtype."""
    half = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    return torch.tensor([*half, *(-n for n in half)], dtype=dtype, device=patterns.device)[patterns.long()]


def scale_numbers(scale: Tensor, format: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the numbers of scales, uint8 bytes of a ``format``; of the same shape."""
    return scale.view(E4M3 if format == NVFP4 else E8M0).to(torch.float32).to(dtype)
