"""2:4 codes of four bits in the order in which sparse tensor cores read them.

``mma.sp.m16n8k32`` multiplies 16 rows and 32 columns of a 2:4 matrix, given as its 16 stored numbers per row and two
bits for each that mark its column in its group, with 32 x 8 dense numbers. Lane ``l`` of a warp, of the quad ``q = l
/ 4`` and the place ``t = l % 4`` in it, holds (f counts the 2:4 groups of the instruction, 0 to 7)

    of the stored numbers   the groups t and t + 4 of the rows q and q + 8
    of the dense numbers    columns 8 j + 2 t and 8 j + 2 t + 1 of the row q, for j = 0 .. 3
    of the result           rows q and q + 8, columns 2 t and 2 t + 1
    of the places           those of two instructions: t / 2 selects which, t % 2 the groups 0 to 3 or 4 to 7;
                            row q in its low half, q + 8 in its high half

A tile is 16 rows and 128 columns, four instructions, for which a lane reads four words of codes and two of places: 24
bytes, three bits per weight, contiguous over a warp. A code word has register ``r`` of the instruction in the nibbles
``r`` (low half of the register) and ``r + 4`` (high half).

Which columns an instruction reads as its group ``f`` is free. Here it is the group ``4 (f % 2) + f / 2`` of its 32
columns: the inputs of lanes 0 and 1 of a quad are then 32 contiguous bytes, and so are those of lanes 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups24 import places as places_of

ROWS, COLUMNS = 16, 128
# The 2:4 group of 32 columns that an instruction reads as its group f.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def fits(rows: int, columns: int) -> bool:
    """Return True if a weight consists of whole tiles."""
    return rows % ROWS == 0 and columns % COLUMNS == 0


def supports_groups(columns: int, group_size: int) -> bool:
    """Return True if groups of columns (of one scale each) begin and end with instructions of a tile, or with tiles."""
    return group_size >= columns or (
        columns % group_size == 0 and (group_size in (32, 64) or group_size % COLUMNS == 0)
    )


def holds(packed: Tensor) -> bool:
    """Return True if ``values`` or ``bits`` have the layout of this module (and not of ``naive.pack``)."""
    return packed.dtype == torch.int32


def pack(codes: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Pack uint8 codes below 16 [out, in] as ``(values, bits)``; those outside ``kept`` (bool [out, in]) are dropped.

    ``values`` is int32 [out / 16, in / 128, 32, 4], ``bits`` int32 [out / 16, in / 128, 32, 2].
    """
    first, second = places_of(kept)
    groups = codes.unflatten(-1, (-1, 4))
    low, high = (groups.gather(-1, at[..., None].long())[..., 0].long() for at in (first, second))
    return _words_of_codes(_split(low), _split(high)), _words_of_places(_split(first.long() | second.long() << 2))


def unpack(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes uint8 [out, in], 0 where none is stored, and bool [out, in]: where one is."""
    low, high = (_joined(part) for part in _codes_of_words(values.long() & 0xFFFFFFFF))
    places = _joined(_places_of_words(bits.long() & 0xFFFFFFFF))
    codes = low.new_zeros((*low.shape, 4))
    at = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    for part, place in ((low, places & 3), (high, places >> 2)):
        codes.scatter_(-1, place[..., None], part[..., None])
        at.scatter_(-1, place[..., None], True)
    return codes.flatten(1).to(torch.uint8), at.flatten(1)


# -- between [out, groups24] and [row tiles, column tiles, q, half of the rows, instruction, half of the groups, t] ----
def _split(groups24: Tensor) -> Tensor:
    ordered = groups24.unflatten(-1, (-1, 8))[..., list(ORDER)]  # [out, instructions, f]
    parts = ordered.view(groups24.shape[0] // ROWS, 2, 8, -1, 4, 2, 4)  # row tile, half, q, column tile, instruction, f
    return parts.permute(0, 3, 2, 1, 4, 5, 6)


def _joined(parts: Tensor) -> Tensor:
    ordered = parts.permute(0, 3, 2, 1, 4, 5, 6).reshape(parts.shape[0] * ROWS, -1, 8)
    return ordered[..., torch.tensor(ORDER).argsort().tolist()].flatten(1)


# Places of registers in a code word: register 0 is (row q, groups 0-3), 1 (q + 8, 0-3), 2 (q, 4-7), 3 (q + 8, 4-7).
def _words_of_codes(low: Tensor, high: Tensor) -> Tensor:
    registers = low | high << 16  # [.., q, half of the rows, instruction, half of the groups, t]
    shifts = 4 * torch.tensor([[0, 2], [1, 3]], device=low.device)[:, None, :, None]
    words = (registers << shifts).sum((3, 5))  # [.., q, instruction, t]
    return _as_int32(words.transpose(-1, -2).flatten(2, 3))


def _codes_of_words(words: Tensor) -> tuple[Tensor, Tensor]:
    shifts = 4 * torch.tensor([[0, 2], [1, 3]], device=words.device)[:, None, :, None]
    lanes = words.unflatten(2, (8, 4)).transpose(-1, -2)[:, :, :, None, :, None]
    registers = lanes >> shifts
    return registers & 15, registers >> 16 & 15


def _words_of_places(places: Tensor) -> Tensor:
    pairs = places.unflatten(4, (2, 2))  # [.., q, half of the rows, word, which of its two, half of the groups, f]
    at = 4 * torch.arange(4, device=places.device) + 16 * torch.arange(2, device=places.device).view(2, 1, 1, 1, 1)
    words = (pairs << at).sum((3, 7))  # [.., q, word, which, half of the groups]
    return _as_int32(words.movedim(3, -1).flatten(2, 4))


def _places_of_words(words: Tensor) -> Tensor:
    at = 4 * torch.arange(4, device=words.device) + 16 * torch.arange(2, device=words.device).view(2, 1, 1, 1, 1)
    lanes = words.view(*words.shape[:2], 8, 2, 2, 2).movedim(-1, 3)  # [.., q, word, which, half of the groups]
    return (lanes[:, :, :, None, ..., None] >> at & 15).flatten(4, 5)


def _as_int32(words: Tensor) -> Tensor:
    """Return words of 32 bits, held as int64, as int32."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
