"""Where the valid tokens of a padded batch lie once they are packed: one row of documents, without padding.

    index[i] = place of packed token i among the B * T places of the batch,   document k = packed tokens cu[k] : cu[k+1]

Numbers of tokens are read from the device once a batch; everything else of a batch stays there.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowFacts:
    """What the host reads of a mask ``[B, T]``: one transfer.

    Attributes:
        lengths: valid tokens of each row.
        firsts: column of the first valid token of each row; 0 for a row without any.
        holes: True if padding lies between valid tokens of a row.
        restarts: True if the given positions of a row begin again within it.
        columns: T.
    """

    lengths: tuple[int, ...]
    firsts: tuple[int, ...]
    holes: bool
    restarts: bool
    columns: int

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def share(self) -> float:
        """Valid tokens, as a share of the places of the batch."""
        return self.total / max(1, len(self.lengths) * self.columns)


def read_rows(valid: Tensor, positions: Tensor | None = None) -> RowFacts:
    """Read the facts of a mask, in one transfer from its device.

    Args:
        valid: bool ``[B, T]``, True for tokens.
        positions: int64 ``[B, T]`` that the caller gave, or None.
    """
    columns = valid.shape[1]
    # The moments of the places of L tokens: their mean is the first place + (L - 1) / 2 and their variance
    # (L^2 - 1) / 12 if they are neighbours, and more if not. Whole numbers below 2^53, so exact.
    moments = valid.double() @ _powers(columns, valid.device)
    if positions is not None:
        begin = positions.gather(1, valid.to(torch.uint8).argmax(1, keepdim=True))
        again = ((positions == begin) & valid).sum(1, keepdim=True) > 1
        moments = torch.cat([moments, again.double()], 1)
    read: list[list[float]] = moments.tolist()
    lengths, firsts, holes = [], [], False
    for count, places, squares, *_ in ([int(x) for x in row] for row in read):
        lengths.append(count)
        holes = holes or 12 * (count * squares - places * places) != count * count * (count * count - 1)
        firsts.append((places - count * (count - 1) // 2) // count if count else 0)
    if holes:
        firsts = valid.to(torch.uint8).argmax(1).tolist()
    restarts = positions is not None and any(row[3] for row in read)
    return RowFacts(tuple(lengths), tuple(firsts), holes, restarts, columns)


@lru_cache(maxsize=8)
def _powers(columns: int, device: torch.device) -> Tensor:
    """Return float64 ``[columns, 3]``: the powers 0, 1 and 2 of each place."""
    with torch.inference_mode(False):
        place = torch.arange(columns, dtype=torch.float64, device=device)
        return torch.stack([torch.ones_like(place), place, place * place], 1)


@dataclass(frozen=True, eq=False)
class Documents:
    """The packed form of a batch.

    Attributes:
        index: int64 ``[total]`` on the device: places of the packed tokens among those of the batch, row by row.
        cu: int32 ``[n + 1]`` on the device: where the documents begin, and the total.
        lengths: of the documents; ascending if ``sorted``.
        longest: of the lengths.
        places: int64 ``[B]`` on the device: the place of the first valid token of each row of the batch.
        rows, columns: B and T.
        kept: results that layers of one forward share, such as a mask with the position bias.
    """

    index: Tensor
    cu: Tensor
    lengths: tuple[int, ...]
    longest: int
    places: Tensor
    rows: int
    columns: int
    kept: dict[str, Tensor]

    @classmethod
    def of(cls, valid: Tensor, facts: RowFacts, ordered: bool) -> Documents:
        """Return the documents of a mask ``[B, T]`` whose facts were read.

        ``ordered`` puts them in the order of their lengths, so that equal ones are neighbours. A row without tokens
        is none. Nothing here waits for the device, unless padding lies between tokens.
        """
        rows, columns = valid.shape
        order = [row for row in range(rows) if facts.lengths[row]]
        if ordered:
            order.sort(key=lambda row: facts.lengths[row])
        lengths = tuple(facts.lengths[row] for row in order)
        places = torch.tensor([row * columns + first for row, first in enumerate(facts.firsts)])
        bounds = torch.tensor([0, *itertools.accumulate(lengths)])
        if facts.holes:
            chosen = torch.tensor(order).to(valid.device)
            within = valid[chosen].reshape(-1).nonzero()[:, 0]  # waits for the device once more
            index = chosen[within // columns] * columns + within % columns
            moved = _upload(torch.cat([bounds, places]), valid.device)
        else:
            counts = torch.tensor(lengths)
            shifts = places[order] - bounds[:-1]
            index = torch.arange(facts.total) + torch.repeat_interleave(shifts, counts, output_size=facts.total)
            moved = _upload(torch.cat([bounds, places, index]), valid.device)
            index = moved[len(bounds) + rows :]
        cu, starts = moved[: len(bounds)].int(), moved[len(bounds) : len(bounds) + rows]
        return cls(index, cu, lengths, max(lengths), starts, rows, columns, {})

    def pack(self, values: Tensor) -> Tensor:
        """Return ``[1, total, ...]`` of values ``[B, T, ...]``; one row ``[1, T, ...]`` stands for all."""
        if values.shape[0] != self.rows:
            return values[0][self.index % self.columns][None]
        return values.flatten(0, 1).index_select(0, self.index)[None]

    def unpack(self, packed: Tensor) -> Tensor:
        """Return ``[B, T, d]`` of packed values ``[1, total, d]``, with zeros where there is padding."""
        padded = packed.new_zeros(self.rows * self.columns, packed.shape[-1])
        return padded.index_copy(0, self.index, packed[0]).view(self.rows, self.columns, -1)

    def first_tokens(self, padded: Tensor) -> Tensor:
        """Return ``[B, 1, d]``, the first valid token of each row of ``[B, T, d]``."""
        return padded.flatten(0, 1).index_select(0, self.places)[:, None]


def equal_groups(lengths: tuple[int, ...] | list[int]) -> list[tuple[int, int, int]]:
    """Return (begin, documents, length) of runs of documents of equal length that are neighbours."""
    groups: list[tuple[int, int, int]] = []
    begin = count = 0
    for k, length in enumerate(lengths):
        count += 1
        if k + 1 == len(lengths) or lengths[k + 1] != length:
            groups.append((begin, count, length))
            begin, count = begin + count * length, 0
    return groups


def _upload(numbers: Tensor, device: torch.device) -> Tensor:
    """Return numbers on a device; the copy to an accelerator does not wait for the work that is queued there."""
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)
