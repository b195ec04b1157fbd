"""The specification of ``hf_optim::codebook_linear`` in plain PyTorch.

A weight ``W`` [out, in] is ``W[n, k] = centroids[code[n, k]]``, but for outliers, which are listed row after row:
those of row n are the entries ``starts[n]`` to ``starts[n + 1]`` of ``values`` and ``columns``. ``y = x W^T + bias`` is
accumulated in float32 (float64 for float64 inputs) and rounded once, to the type of ``x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 16


def plane(columns: int) -> int:
    """Columns that one product of the kernel takes: 32, or 16 where chunks of 32 would be padded by an eighth."""
    return 32 if 8 * (-columns % (32 * WORD)) <= columns else 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 [out, in] as int16 [bits, chunks, out, plane].

    A chunk is of ``16 * plane`` columns. Bit p of word j belongs to column ``p * plane + j`` of the chunk, and the word
    holds bit b of the codes in the b-th of the outermost dimension. Columns are padded with zeros to whole chunks.
    """
    rows, columns = codes.shape
    size = plane(columns)
    padded = torch.nn.functional.pad(codes, (0, -columns % (WORD * size))).view(rows, -1, WORD, size)
    words = torch.zeros(bits, padded.shape[1], rows, size, dtype=torch.int32, device=codes.device)
    for index in range(WORD):
        part = padded[:, :, index].transpose(0, 1).to(torch.int32)
        for bit in range(bits):
            words[bit] |= ((part >> bit) & 1) << index
    # Two's complement: words from 2^15 on are negative.
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def unpack(words: Tensor, columns: int) -> Tensor:
    """The codes [out, in] (uint8) of packed words."""
    bits, chunks, rows, size = words.shape
    codes = torch.zeros(rows, chunks, WORD, size, dtype=torch.uint8, device=words.device)
    for index in range(WORD):
        for bit in range(bits):
            flags = ((words[bit].to(torch.int32) >> index) & 1).to(torch.uint8)
            codes[:, :, index] |= (flags << bit).transpose(0, 1)
    return codes.view(rows, -1)[:, :columns]


def rows_of(starts: Tensor, count: int) -> Tensor:
    """The row of each of ``count`` outliers, int64; ``starts`` [out + 1] counts those before each row."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(rows, starts.diff().long(), output_size=count)


def dequantize(
    words: Tensor, centroids: Tensor, values: Tensor, columns: Tensor, starts: Tensor, width: int, dtype: torch.dtype
) -> Tensor:  # fmt: skip
    """The weight [out, in] in ``dtype``; ``width`` is ``in``."""
    weight = centroids.to(dtype)[unpack(words, width).long()]
    return weight.index_put_((rows_of(starts, len(values)), columns.long()), values.to(dtype))


def codebook_linear(
    x: Tensor, words: Tensor, centroids: Tensor, values: Tensor, columns: Tensor, starts: Tensor, bias: Tensor | None
) -> Tensor:  # fmt: skip
    """``x W^T + bias``: ``x`` [..., in], result [..., out] of the same type."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    weight = dequantize(words, centroids, values, columns, starts, x.shape[-1], compute)
    y = x.to(compute) @ weight.T
    return (y if bias is None else y + bias.to(compute)).to(x.dtype)
