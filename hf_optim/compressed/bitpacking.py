"""Codes of a few bits packed into 32-bit words: least significant bits first; a code may span two words.

compressed-tensors packs this way along the rows, GPTQ along the columns (also with 3 bits, where its 32 codes in three
words have the same layout).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Codes unpacked at once if they span words: each takes eight bytes of temporary memory.
CHUNK = 1 << 22


def word_count(count: int, bits: int) -> int:
    """Return the number of words that ``count`` codes take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Unpack int32 ``[rows, words]`` to uint8 ``[rows, count]``, codes in [0, 2^bits)."""
    if 8 % bits == 0:
        # No code spans two bytes. (This assumes a little-endian host, like all that torch supports with accelerators.)
        narrow = words.contiguous().view(torch.uint8)
        if bits == 8:
            return narrow[:, :count].contiguous()
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=words.device)
        codes = narrow[..., None].bitwise_right_shift(shifts).bitwise_and_((1 << bits) - 1)
        return codes.view(len(words), -1)[:, :count].contiguous()
    codes = torch.empty(len(words), count, dtype=torch.uint8, device=words.device)
    rows = max(1, CHUNK // max(1, count))
    for begin in range(0, len(words), rows):
        codes[begin : begin + rows] = _unpack_across(words[begin : begin + rows], bits)[:, :count]
    return codes


def _unpack_across(words: Tensor, bits: int) -> Tensor:
    # 32 codes take ``bits`` words. One more word of zeros, since the last code also reads the word after its own.
    rows, found = words.shape
    groups = -(-found // bits)
    wide = torch.zeros(rows, groups, bits + 1, dtype=torch.int64, device=words.device)
    padded = torch.nn.functional.pad(words, (0, groups * bits - found))
    wide[..., :bits] = padded.view(rows, groups, bits).to(torch.int64) & 0xFFFFFFFF
    starts = torch.arange(32, device=words.device) * bits
    word, offset = starts // 32, starts % 32
    codes = (wide[..., word] >> offset) | (wide[..., word + 1] << (32 - offset))
    return (codes & ((1 << bits) - 1)).to(torch.uint8).view(rows, -1)
