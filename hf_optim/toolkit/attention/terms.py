"""What a query may see, as data: a pattern is a union of terms, and each term is a set of pairs of query and key.

A term says which pairs it holds (``sees``), where the keys of a run of queries lie (``spans``, for lists of blocks) and
which keys a later query can still see (``stays``, for caches). Masks, lists of blocks, gathers and caches follow from
these. Positions are those of a row without its padding: its first token has position 0.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Spans = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Term:
    """A set of pairs of query and key. Subclasses are frozen, so that patterns are equal when their terms are."""

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        """Return True where the query at a position sees the key at a position.

        Args:
            query, key: int64 positions, of shapes that broadcast.
            length: number of tokens in the row.
        """
        raise NotImplementedError

    def traceable(self, length: int, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        """Return ``sees`` in rows of one length, for compilers: what it looks up is made before."""
        return lambda query, key: self.sees(query, key, length)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        """Return spans of key places that hold every key of a run of queries; they may hold more.

        Args:
            first, last: int64 ``[R]``: the first and the last query place of each run, in the order of the term.
            length: number of tokens in the row.

        Returns:
            Pairs of int64 ``[R]``: first key place, and the one after the last. A span may be empty or reach outside.
        """
        raise NotImplementedError

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        """Return True for keys that a query at position ``query`` or later can see; True for all is always right.

        ``query`` is a number, or one for each key. ``length`` is the largest number of tokens that the row can get,
        2^31 - 1 where it has no limit.
        """
        return torch.ones_like(key, dtype=torch.bool)

    def most_seen(self, length: int) -> int:
        """Return how many keys a query of a causal row sees at most; ``length``, that of the row, is always right."""
        return length

    def orders(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        """Return the tokens in the order of query places and of key places, in which the term has empty blocks.

        None for the natural order. -1 marks an empty place; a token without a place is not in the term.
        """
        return None

    @property
    def order(self) -> tuple[str, int]:
        """Terms of a pattern with the same name of their order are computed in one pass."""
        return ("natural", 1)

    @property
    def moves_along(self) -> bool:
        """True if only the distance of query and key counts, so that a row may begin at any place."""
        return False

    @property
    def reads_length(self) -> bool:
        """True if what a query sees depends on the number of tokens in the row."""
        return False

    @property
    def length_step(self) -> int:
        """Rows with the same number of steps, rounded up, see the same, of a term that reads lengths."""
        return 1

    def holds_all(self, length: int, causal: bool) -> bool:
        """Return True if it is known that the term holds every pair that the model allows in a row of ``length``."""
        return False


@dataclass(frozen=True)
class Band(Term):
    """Keys ``i - j`` positions before the query, with ``-after <= i - j <= before`` and ``(i - j) % step == 0``.

    ``before=None`` and ``after=None`` have no limit.
    """

    before: int | None
    after: int | None = 0
    step: int = 1

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        distance = query - key
        found = torch.ones_like(distance, dtype=torch.bool)
        if self.before is not None:
            found = found & (distance <= self.before)
        if self.after is not None:
            found = found & (distance >= -self.after)
        return found & (distance % self.step == 0) if self.step > 1 else found

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        if self.step == 1:
            low, high = torch.zeros_like(first), torch.full_like(last, length)
        else:
            # Residues in turn: a run of places lies in one residue class, or in several whole ones.
            each = -(-length // self.step)
            low, high = first // each * each, (last // each + 1) * each
        if self.before is not None:
            low = torch.maximum(low, first - self.before // self.step)
        if self.after is not None:
            high = torch.minimum(high, last + self.after // self.step + 1)
        return [(low, high)]

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        if self.before is None:
            return super().stays(key, query, length)
        return key >= query - self.before

    def most_seen(self, length: int) -> int:
        return (length - 1 if self.before is None else min(self.before, length - 1)) // self.step + 1

    def orders(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        if self.step == 1:
            return None
        each = -(-length // self.step)
        places = torch.arange(each * self.step, device=device)
        tokens = places % each * self.step + places // each
        tokens = torch.where(tokens < length, tokens, -1)
        return tokens, tokens

    @property
    def order(self) -> tuple[str, int]:
        return ("residues", self.step) if self.step > 1 else ("natural", 1)

    @property
    def moves_along(self) -> bool:
        return True

    def holds_all(self, length: int, causal: bool) -> bool:
        reaches_back = self.before is None or self.before >= length - 1
        reaches_on = causal or self.after is None or self.after >= length - 1
        return self.step == 1 and reaches_back and reaches_on


@dataclass(frozen=True)
class Chunks(Term):
    """Keys in the query's own chunk of ``size`` positions; the first chunk begins at ``start``, none lies before."""

    size: int
    start: int = 0

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        query, key = query - self.start, key - self.start
        return (query // self.size == key // self.size) & (query >= 0) & (key >= 0)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        low = (first - self.start).clamp_min(0) // self.size * self.size + self.start
        high = ((last - self.start) // self.size + 1) * self.size + self.start
        return [(low, torch.where(last >= self.start, high, low))]

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        return (key >= self.start) & (key >= (query - self.start) // self.size * self.size + self.start)

    def most_seen(self, length: int) -> int:
        return min(self.size, length)


@dataclass(frozen=True)
class ShiftedChunks(Term):
    """Keys in the chunk of ``size`` positions that lies ``shift`` chunks before the query's own.

    The first ``shift`` chunks have none: their queries see the last chunks of the row if it ``wraps``, so that chunks
    are permuted, else their own chunk, as fits a causal model.
    """

    size: int
    shift: int
    wraps: bool = False

    @property
    def reads_length(self) -> bool:
        return self.wraps

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        own, other = query // self.size, key // self.size
        if self.wraps:
            return other == (own - self.shift) % -(-length // self.size)
        return other == torch.where(own >= self.shift, own - self.shift, own)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        low, high = first // self.size, last // self.size
        count = -(-length // self.size)
        shift = self.shift % count if self.wraps else self.shift
        moved = count - shift if self.wraps else 0  # where the first chunks look
        before = high.clamp_max(shift - 1)
        return [
            ((low - shift).clamp_min(0) * self.size, (high - shift + 1).clamp_min(0) * self.size),
            ((low + moved) * self.size, torch.where(low < shift, (before + moved + 1) * self.size, 0)),
        ]

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        if self.wraps:
            return super().stays(key, query, length)
        return key >= (query // self.size - self.shift) * self.size

    def most_seen(self, length: int) -> int:
        return min(self.size, length)


@dataclass(frozen=True)
class Segments(Term):
    """Keys in the query's own segment of ``size`` positions, and in the ``memory`` positions before that segment."""

    size: int
    memory: int

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        begin = query // self.size * self.size
        return (key >= begin - self.memory) & (key < begin + self.size)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        return [(first // self.size * self.size - self.memory, (last // self.size + 1) * self.size)]

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        return key >= query // self.size * self.size - self.memory

    def most_seen(self, length: int) -> int:
        return min(self.size + self.memory, length)

    def holds_all(self, length: int, causal: bool) -> bool:
        reaches_back = (length - 1) // self.size * self.size <= self.memory
        return reaches_back and (causal or length <= self.size)


@dataclass(frozen=True)
class Columns(Term):
    """All queries see ``width`` positions of every ``period``: the last ones, but for ``skip``; none sees the rest."""

    period: int
    width: int = 1
    skip: int = 0

    def holds(self, key: Tensor) -> Tensor:
        """Return True where a position is in a column."""
        place = key % self.period
        return (place >= self.period - self.skip - self.width) & (place < self.period - self.skip)

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        return self.holds(key) & (query >= 0)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        rest = length % self.period - self.period + self.skip + self.width
        count = length // self.period * self.width + min(self.width, max(0, rest))
        return [(torch.zeros_like(first), torch.full_like(last, count))]

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        return self.holds(key)

    def most_seen(self, length: int) -> int:
        return min(-(-length // self.period) * self.width, length)

    def orders(self, length: int, device: torch.device) -> tuple[Tensor, Tensor] | None:
        tokens = torch.arange(length, device=device)
        return tokens, tokens[self.holds(tokens)]

    @property
    def order(self) -> tuple[str, int]:
        # All columns of one width and period have the same places.
        return (f"columns of {self.width} before {self.skip}", self.period)


@dataclass(frozen=True)
class GlobalTokens(Term):
    """Tokens at fixed positions that every query sees (``seen``), and that see every key (``see``).

    ``first`` and ``last`` count tokens at both ends of the row, ``positions`` names others. A row that grows while it
    is generated has no last tokens yet: ``last`` is for models that read whole rows.
    """

    first: int = 0
    last: int = 0
    positions: tuple[int, ...] = ()
    seen: bool = True
    see: bool = True

    @property
    def reads_length(self) -> bool:
        return self.last > 0

    def holds(self, position: Tensor, length: int) -> Tensor:
        """Return True where a position is that of a global token."""
        found = (position < self.first) | (position >= length - self.last)
        for place in self.positions:
            found = found | (position == place)
        return found

    def sees(self, query: Tensor, key: Tensor, length: int) -> Tensor:
        nothing = torch.zeros((), dtype=torch.bool, device=key.device)
        columns = self.holds(key, length) if self.seen else nothing
        rows = self.holds(query, length) if self.see else nothing
        return columns | rows

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        zero = torch.zeros_like(first)
        runs = _runs(self.positions)
        found = []
        if self.seen:
            ends = [(0, self.first), (length - self.last, length), *runs]
            found += [(zero + low, zero + high) for low, high in ends if high > low]
        if self.see:
            whole = (first < self.first) | (last >= length - self.last)
            for low, high in runs:
                whole = whole | ((first < high) & (last >= low))
            found.append((zero, torch.where(whole, length, 0)))
        return found

    def stays(self, key: Tensor, query: int | Tensor, length: int) -> Tensor:
        if self.last:  # of a row that grows, they are not known
            return super().stays(key, query, length)
        found = self.holds(key, length) if self.seen else torch.zeros_like(key, dtype=torch.bool)
        # A later global token sees everything.
        return found | (query <= max((self.first - 1, *self.positions))) if self.see else found

    def most_seen(self, length: int) -> int:
        if self.last or (self.see and self.positions):
            return length
        return min(self.first + len(set(self.positions)), length)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Return the half-open runs of neighbouring positions."""
    runs: list[tuple[int, int]] = []
    for place in sorted(set(positions)):
        if runs and runs[-1][1] == place:
            runs[-1] = (runs[-1][0], place + 1)
        else:
            runs.append((place, place + 1))
    return runs
