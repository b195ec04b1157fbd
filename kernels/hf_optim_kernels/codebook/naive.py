"""The specification of ``hf_optim::codebook_linear`` in plain PyTorch.

A weight ``W`` [out, in] is ``W[n, k] = centroids[code[n, k]]``, except for its outliers, which are listed row after
row: those of row n are the entries ``starts[n]`` to ``starts[n + 1]`` of ``values`` and ``columns``. ``y = x W^T +
bias`` is accumulated in float32 (float64 for float64 inputs) and rounded once, to the dtype of ``x``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

WORD = 16


class PackedTensors(NamedTuple):
    """A packed weight [out, in].

    Attributes:
        words: int16 [bits, k-tiles, out, slice], made by ``pack``.
        table: [2^bits], the centroids in the dtype of the inputs.
        registers: int32 [8], made of 16-bit centroids by ``lookup.tables``; any where bits > 4 or inputs are float32.
        values: [outliers], row after row.
        columns: integers [outliers].
        owners: int32 [outliers], their rows.
        starts: int32 [out + 1], how many outliers precede each row.
        bias: [out], or None.
        semaphores: int32 split-k semaphores, zeros before and after a call; the specification does not read them.
    """

    words: Tensor
    table: Tensor
    registers: Tensor
    values: Tensor
    columns: Tensor
    owners: Tensor
    starts: Tensor
    bias: Tensor | None
    semaphores: Tensor | None


def slice_columns(columns: int) -> int:
    """Return the columns of a k-slice: 32, or 16 where k-tiles of 32 would be padded by more than an eighth."""
    return 32 if 8 * (-columns % (32 * WORD)) <= columns else 16


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes uint8 [out, in] as int16 [bits, k-tiles, out, slice].

    A k-tile has ``16 * slice`` columns. Bit s of word j belongs to column ``s * slice + j`` of the k-tile, and the word
    holds bit b of the codes in the b-th of the outermost dimension. Columns are padded with zeros to whole k-tiles.
    """
    rows, columns = codes.shape
    size = slice_columns(columns)
    padded = torch.nn.functional.pad(codes, (0, -columns % (WORD * size))).view(rows, -1, WORD, size)
    words = torch.zeros(bits, padded.shape[1], rows, size, dtype=torch.int32, device=codes.device)
    for index in range(WORD):
        part = padded[:, :, index].transpose(0, 1).to(torch.int32)
        for bit in range(bits):
            words[bit] |= ((part >> bit) & 1) << index
    # Two's complement: words from 2^15 on are negative.
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def unpack(words: Tensor, columns: int) -> Tensor:
    """Return the codes [out, in] (uint8) of packed words."""
    bits, tiles, rows, size = words.shape
    codes = torch.zeros(rows, tiles, WORD, size, dtype=torch.uint8, device=words.device)
    for index in range(WORD):
        for bit in range(bits):
            flags = ((words[bit].to(torch.int32) >> index) & 1).to(torch.uint8)
            codes[:, :, index] |= (flags << bit).transpose(0, 1)
    return codes.view(rows, -1)[:, :columns]


def rows_of(starts: Tensor, count: int) -> Tensor:
    """Return the row of each of ``count`` outliers, int64; ``starts`` [out + 1] counts those before each row."""
    rows = torch.arange(len(starts) - 1, device=starts.device)
    return torch.repeat_interleave(rows, starts.diff().long(), output_size=count)


def dequantize(weight: PackedTensors, columns: int, dtype: torch.dtype) -> Tensor:
    """Return the weight [out, in] in ``dtype``; ``columns`` is ``in``."""
    dense = weight.table.to(dtype)[unpack(weight.words, columns).long()]
    at = rows_of(weight.starts, len(weight.values)), weight.columns.long()
    return dense.index_put_(at, weight.values.to(dtype))


def codebook_linear(x: Tensor, weight: PackedTensors) -> Tensor:
    """Return ``x W^T + bias``: ``x`` [..., in], result [..., out] of the same dtype."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    y = x.to(compute) @ dequantize(weight, x.shape[-1], compute).T
    return (y if weight.bias is None else y + weight.bias.to(compute)).to(x.dtype)
