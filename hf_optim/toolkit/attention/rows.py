"""Rows of a batch as a pattern counts them: without their padding, and each document of a packed row by itself.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

UNWRITTEN = -2
SEGMENTS = torch.int16  # of segments in the place of a mask: no caller has masks of this dtype


@dataclass(frozen=True, eq=False)
class Rows:
    """Which tokens of a batch belong together.

    Attributes:
        segments: int32 ``[B, M]``: the number of the document in its row, which does not fall along the row; -1 for
            padding, ``UNWRITTEN`` for places of a cache that no token has reached.
        offset: place of the first query among the keys.
        left: some row begins with padding.
        packed: some row holds several documents.
        holes: some row has padding between its tokens, as when a batch that is padded on the right is continued.
        padded: some row has padding.
        whole: each row has as many tokens as there are places.
    """

    segments: Tensor
    offset: int = 0
    left: bool = False
    packed: bool = False
    holes: bool = False
    padded: bool = False
    whole: bool = True

    @classmethod
    def of(cls, segments: Tensor, offset: int = 0) -> Rows:
        """Return the rows of ``segments``. This waits for the device."""
        valid = segments >= 0
        facts = torch.stack([
            (~valid[:, 0]).any(),
            (segments > 0).any(),
            (valid[:, 1:] & ~valid[:, :-1] & (valid.cumsum(1)[:, :-1] > 0)).any(),
            (segments == -1).any(),
            valid.all(),
        ]).tolist()  # fmt: skip
        return cls(segments, offset, *facts)

    @property
    def plain(self) -> bool:
        """True if each row is one document without padding."""
        return not (self.padded or self.packed)

    def continues(self, earlier: Rows | None, tokens: int) -> bool:
        """Return True if the first ``tokens`` are padding where they were ``earlier``; None: none of them was.

        This waits for the device, once for each forward.
        """
        known: dict[int, bool] = vars(self).setdefault("_continued", {})
        if id(earlier) not in known:
            now = self.segments[:, :tokens] >= 0
            before = torch.ones_like(now) if earlier is None else earlier.segments[:, :tokens] >= 0
            known[id(earlier)] = torch.equal(now, before)
        return known[id(earlier)]

    def positions(self) -> Tensor:
        """Return the position of each key in its document, int64 ``[B, M]``; that of padding means nothing."""
        return self._positions

    @cached_property
    def _positions(self) -> Tensor:
        valid = self.segments >= 0
        token = valid.cumsum(1) - 1
        highest = self.segments.cummax(1).values
        begins = valid.clone()
        begins[:, 1:] &= self.segments[:, 1:] > highest[:, :-1]
        return (token - torch.where(begins, token, 0).cummax(1).values).clamp_min(0)

    def chosen(self, index: Tensor) -> Rows | None:
        """Return chosen rows of the batch, int64 ``[rows]``; None if they are plain. The last answer is kept."""
        asked, found = self.__dict__.get("_chosen", (None, None))
        if asked is not index:
            made = Rows.of(self.segments[index], self.offset)
            found = None if made.plain else made
            self.__dict__["_chosen"] = (index, found)
        return found

    def until(self, length: int) -> Rows | None:
        """Return the first ``length`` tokens of the rows; None if they are plain. The last answer is kept."""
        asked, found = self.__dict__.get("_until", (None, None))
        if asked != length:
            made = Rows.of(self.segments[:, :length], self.offset)
            found = None if made.plain else made
            self.__dict__["_until"] = (length, found)
        return found

    @cached_property
    def tokens(self) -> list[int]:
        """The number of tokens in each row. This waits for the device."""
        return (self.segments >= 0).sum(1).tolist()


@dataclass(frozen=True, eq=False)
class Apart:
    """Documents moved into rows of their own, that begin at place 0 and are padded at the end.

    Attributes:
        index: int64 ``[R, P]``: the token ``row * M + place`` of each new place, -1 for padding.
        back: int64 ``[B * M]``: the new place ``row * P + place`` of each token; padding points anywhere.
        valid: bool ``[B * M]``: True for tokens, False for padding.
    """

    index: Tensor
    back: Tensor
    valid: Tensor

    @classmethod
    def of(cls, rows: Rows) -> Apart:
        """Return where the documents of ``rows`` go."""
        segments = rows.segments.long()
        batch, length = segments.shape
        valid = (segments >= 0).flatten()
        document = (torch.arange(batch, device=segments.device)[:, None] * length + segments).flatten()
        if not bool(valid.any()):  # one row of one token, which ``put`` leaves out
            return cls(segments.new_zeros(1, 1), segments.new_zeros(batch * length), valid)
        _, row = torch.unique(document[valid], return_inverse=True)
        place = rows.positions().flatten()[valid]
        index = segments.new_full((int(row.max()) + 1, int(place.max()) + 1), -1)
        index[row, place] = valid.nonzero()[:, 0]
        back = segments.new_zeros(batch * length)
        back[valid] = row * index.shape[1] + place
        return cls(index, back, valid)

    def lengths(self) -> Tensor:
        """Return the number of tokens in each new row, int64 ``[R]``."""
        return (self.index >= 0).sum(1)

    def take(self, part: Tensor) -> Tensor:
        """Return ``[B, H, M, D]`` as ``[R, H, P, D]``."""
        tokens = part.transpose(1, 2).flatten(0, 1)
        return tokens[self.index.clamp_min(0)].transpose(1, 2)

    def put(self, part: Tensor, batch: int) -> Tensor:
        """Return ``[R, H, P, D]`` as ``[B, H, M, D]``, zero at padding."""
        tokens = part.transpose(1, 2).flatten(0, 1)[self.back]
        tokens = tokens.masked_fill(~self.valid[:, None, None], 0)
        return tokens.unflatten(0, (batch, -1)).transpose(1, 2)

    def segments(self) -> Tensor:
        """Return 0 for tokens and -1 for padding, int32 ``[R, P]``."""
        return torch.where(self.index >= 0, 0, -1).int()
