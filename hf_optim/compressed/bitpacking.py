"""Codes of a few bits in 32-bit words: least significant bits first, a code may begin in one word and end in the next.

This is how compressed-tensors packs (along the rows), and GPTQ (along the columns; for 3 bits too, whose 32 codes to
three words come out the same).
"""

from __future__ import annotations

import torch
from torch import Tensor

# Codes decoded at once where they cross words: eight bytes each in between.
CHUNK = 1 << 22


def word_count(count: int, bits: int) -> int:
    """How many words ``count`` codes take."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """int32 ``[rows, words]`` -> uint8 ``[rows, count]``, codes in [0, 2^bits)."""
    if 8 % bits == 0:
        # No code crosses a byte. (Little-endian hosts, like every one that torch supports on an accelerator.)
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
    # 32 codes take `bits` words. One word of zeros more, since the last code asks for the word after its own.
    rows, found = words.shape
    groups = -(-found // bits)
    wide = torch.zeros(rows, groups, bits + 1, dtype=torch.int64, device=words.device)
    padded = torch.nn.functional.pad(words, (0, groups * bits - found))
    wide[..., :bits] = padded.view(rows, groups, bits).to(torch.int64) & 0xFFFFFFFF
    starts = torch.arange(32, device=words.device) * bits
    word, offset = starts // 32, starts % 32
    codes = (wide[..., word] >> offset) | (wide[..., word + 1] << (32 - offset))
    return (codes & ((1 << bits) - 1)).to(torch.uint8).view(rows, -1)
