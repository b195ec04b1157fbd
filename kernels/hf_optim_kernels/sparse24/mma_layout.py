"""2:4 codes of four bits in the order in which sparse tensor cores take them.

``mma.sp.m16n8k32`` multiplies 16 rows and 32 columns of a 2:4 matrix, given as its 16 stored numbers a row and two
bits for each that say where it stands in its four, with 32 x 8 dense numbers. Lane ``l`` of a warp, of the quad ``q = l
/ 4`` and the place ``t = l % 4`` in it, holds (f counts the fours of the instruction, 0 to 7)

    of the stored numbers   the fours t and t + 4 of the rows q and q + 8
    of the dense numbers    columns 8 j + 2 t and 8 j + 2 t + 1 of the row q, for j = 0 .. 3
    of the result           rows q and q + 8, columns 2 t and 2 t + 1
    of the places           those of two instructions: t / 2 says which, t % 2 whether the fours 0 to 3 or 4 to 7;
                            row q in its low half, q + 8 in its high half

A tile is 16 rows and 128 columns, four instructions, for which a lane reads four words of codes and two of places: 24
bytes, three bits a weight, side by side for a warp. A code word has register ``r`` of the instruction in the nibbles
``r`` (low half of the register) and ``r + 4`` (high half).

Which columns an instruction sees as its four ``f`` is free. Here it is the four ``4 (f % 2) + f / 2`` of its 32
columns: the inputs of lanes 0 and 1 of a quad are then 32 bytes side by side, and so are those of lanes 2 and 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .groups24 import places as places_of

ROWS, COLUMNS, LANES = 16, 128, 32
# The four of 32 columns that an instruction sees as its four f.
ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def fits(rows: int, columns: int) -> bool:
    """Whether a weight is made of whole tiles."""
    return rows % ROWS == 0 and columns % COLUMNS == 0


def takes_groups(columns: int, group_size: int) -> bool:
    """Whether groups of so many columns (of one scale each) begin and end with instructions of a tile, or tiles."""
    return group_size >= columns or (
        columns % group_size == 0 and (group_size in (32, 64) or group_size % COLUMNS == 0)
    )


def holds(packed: Tensor) -> bool:
    """Whether ``values`` or ``bits`` are those of this module (and not of ``naive.pack``)."""
    return packed.dtype == torch.int32


def pack(codes: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """uint8 codes below 16, [out, in], as ``(values, bits)``; those outside ``kept`` (bool, [out, in]) are dropped.

    ``values`` is int32 [out / 16, in / 128, 32, 4], ``bits`` int32 [out / 16, in / 128, 32, 2].
    """
    first, second = places_of(kept)
    fours = codes.unflatten(-1, (-1, 4))
    low, high = (fours.gather(-1, at[..., None].long())[..., 0].long() for at in (first, second))
    return _words_of_codes(_split(low), _split(high)), _words_of_places(_split(first.long() | second.long() << 2))


def unpack(values: Tensor, bits: Tensor) -> tuple[Tensor, Tensor]:
    """The codes uint8 [out, in], 0 where none is stored, and bool [out, in]: where one is."""
    low, high = (_joined(part) for part in _codes_of_words(values.long() & 0xFFFFFFFF))
    places = _joined(_places_of_words(bits.long() & 0xFFFFFFFF))
    codes = low.new_zeros((*low.shape, 4))
    at = torch.zeros(codes.shape, dtype=torch.bool, device=codes.device)
    for part, place in ((low, places & 3), (high, places >> 2)):
        codes.scatter_(-1, place[..., None], part[..., None])
        at.scatter_(-1, place[..., None], True)
    return codes.flatten(1).to(torch.uint8), at.flatten(1)


# -- between [out, fours] and [row tiles, column tiles, q, half of the rows, instruction, half of the fours, t] --------
def _split(fours: Tensor) -> Tensor:
    ordered = fours.unflatten(-1, (-1, 8))[..., list(ORDER)]  # [out, instructions, f]
    parts = ordered.view(fours.shape[0] // ROWS, 2, 8, -1, 4, 2, 4)  # row tile, half, q, column tile, instruction, f
    return parts.permute(0, 3, 2, 1, 4, 5, 6)


def _joined(parts: Tensor) -> Tensor:
    ordered = parts.permute(0, 3, 2, 1, 4, 5, 6).reshape(parts.shape[0] * ROWS, -1, 8)
    return ordered[..., torch.tensor(ORDER).argsort().tolist()].flatten(1)


# Places of registers in a code word: register 0 is (row q, fours 0-3), 1 (q + 8, 0-3), 2 (q, 4-7), 3 (q + 8, 4-7).
def _words_of_codes(low: Tensor, high: Tensor) -> Tensor:
    registers = low | high << 16  # [.., q, half of the rows, instruction, half of the fours, t]
    shifts = 4 * torch.tensor([[0, 2], [1, 3]], device=low.device)[:, None, :, None]
    words = (registers << shifts).sum((3, 5))  # [.., q, instruction, t]
    return _as_int32(words.transpose(-1, -2).flatten(2, 3))


def _codes_of_words(words: Tensor) -> tuple[Tensor, Tensor]:
    shifts = 4 * torch.tensor([[0, 2], [1, 3]], device=words.device)[:, None, :, None]
    lanes = words.unflatten(2, (8, 4)).transpose(-1, -2)[:, :, :, None, :, None]
    registers = lanes >> shifts
    return registers & 15, registers >> 16 & 15


def _words_of_places(places: Tensor) -> Tensor:
    pairs = places.unflatten(4, (2, 2))  # [.., q, half of the rows, word, which of its two, half of the fours, f]
    at = 4 * torch.arange(4, device=places.device) + 16 * torch.arange(2, device=places.device).view(2, 1, 1, 1, 1)
    words = (pairs << at).sum((3, 7))  # [.., q, word, which, half of the fours]
    return _as_int32(words.movedim(3, -1).flatten(2, 4))


def _places_of_words(words: Tensor) -> Tensor:
    at = 4 * torch.arange(4, device=words.device) + 16 * torch.arange(2, device=words.device).view(2, 1, 1, 1, 1)
    lanes = words.view(*words.shape[:2], 8, 2, 2, 2).movedim(-1, 3)  # [.., q, word, which, half of the fours]
    return (lanes[:, :, :, None, ..., None] >> at & 15).flatten(4, 5)


def _as_int32(words: Tensor) -> Tensor:
    """Words of 32 bits held as int64."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
