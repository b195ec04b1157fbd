"""Which keys of a row a cache still holds, and which of them a query reads.

A cache drops keys that no later query can see, so the keys that it holds are not neighbours, and the rows of a padded
batch hold different ones. Layers with the same patterns share what is worked out here.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from .attend import masked_attention
from .blocked import DistanceBias
from .dense_attention import dense_product
from .head_patterns import HeadPatterns, as_bias, seen_by_head
from .pattern import kept_tensors
from .rows import Rows

NO_LIMIT = 2**31 - 1  # tokens of a row
QUERIES_AT_ONCE = 128  # that share one gather of keys
GATHERED_SHARE = 0.5  # of the keys that are held; queries that see more read all of them


@dataclass(frozen=True, eq=False)
class Reading:
    """The keys that a run of queries reads.

    Attributes:
        index: int64 ``[1 or B, V]``: their places among the keys that are held; None for all of them.
        places: int64 ``[1 or B, V]``: their places in the row.
        seen: bool ``[1 or B, H or 1, n, V]``: what each query sees; None if every query sees every key.
    """

    index: Tensor | None
    places: Tensor
    seen: Tensor | None


@dataclass(eq=False)
class Kept:
    """The tokens whose keys a layer holds. Objects do not change: each step makes a new one.

    Attributes:
        heads: the patterns of the layer.
        places: int64 ``[1 or B, K]``: the place of each token in its row, with its padding; -1 for none.
        tokens: how many have been read.
        since: a crop to fewer tokens than these misses keys; 0 while all are held.
        ragged: some rows hold more tokens than others.
        run: these are the last tokens of each row, one after the other.
    """

    heads: HeadPatterns
    places: Tensor
    tokens: int
    since: int = 0
    ragged: bool = False
    run: bool = False

    def __post_init__(self) -> None:
        # What followed last, with what it followed from: layers of a model ask for the same one after the other.
        self._memo: dict[str, tuple[Any, Any]] = {}

    def __deepcopy__(self, memo: Any) -> Kept:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_memo": {}}

    @classmethod
    def first(cls, heads: HeadPatterns, tokens: int, device: torch.device) -> Kept:
        """Return the state after the first ``tokens`` tokens, all of them held."""
        key = (heads, tokens, device)
        found = _firsts.get(key)
        if found is None:
            found = _firsts[key] = cls(heads, torch.arange(tokens, device=device)[None], tokens, run=True)
        return found

    def with_more(self, count: int) -> Kept:
        """Return the state after ``count`` more tokens."""
        return self._once("more", count, self._with_more)

    def _with_more(self, count: int) -> Kept:
        new = torch.arange(self.tokens, self.tokens + count, device=self.places.device)
        places = torch.cat([self.places, new.expand(len(self.places), -1)], 1)
        return Kept(self.heads, places, self.tokens + count, self.since, self.ragged, self.run)

    def visible_later(self, rows: Rows | None) -> tuple[Tensor | None, Kept]:
        """Return the keys to hold on to, int64 ``[1 or B, K]`` (None for all), and the state with only these.

        Args:
            rows: of all tokens so far; None if there is no padding.
        """
        return self._once("later", rows, self._visible_later)

    def _visible_later(self, rows: Rows | None) -> tuple[Tensor | None, Kept]:
        if self.heads.reads_length or not self.heads.causal:
            return None, self
        positions, valid = self._located(rows)
        ahead = [self.tokens] * len(positions) if rows is None else rows.tokens
        stays = torch.stack([
            torch.stack([pattern.stays(row, query, NO_LIMIT) for pattern in self.heads.patterns]).any(0)
            for row, query in zip(positions, ahead, strict=True)
        ]) & valid  # fmt: skip
        count = int(stays.sum(1).max())
        if count == self.places.shape[1]:
            return None, self
        index = _first_true(stays, count)
        places = self.places.expand(len(stays), -1).gather(1, index)
        real = stays.gather(1, index)
        places, ragged = torch.where(real, places, -1), not bool(real.all())
        run = self.run and rows is None and self.heads.nearest is not None
        return index, Kept(self.heads, places, self.tokens, self.tokens, ragged, run)

    def cropped(self, count: int) -> Kept:
        """Return the state before the last ``count`` tokens. Raises ``ValueError`` if keys of that state are gone."""
        if self.since > self.tokens - count:
            raise ValueError(
                f"the cache cannot go back from {self.tokens} tokens to {self.tokens - count}: keys that are seen "
                f"there were dropped at {self.since} tokens. Call activate_past_recording() on the cache before tokens "
                "that may be taken back"
            )
        places = self.places[:, : self.places.shape[1] - count]
        return Kept(self.heads, places, self.tokens - count, self.since, self.ragged, self.run)

    def of_rows(self, index: Tensor) -> Kept:
        """Return the state of chosen rows of the batch, int64 ``[rows]``."""
        if len(self.places) == 1 and not self.ragged:
            return self  # all rows hold the same
        return self._once("rows", index, self._of_rows)

    def _of_rows(self, index: Tensor) -> Kept:
        return Kept(self.heads, self.places[index], self.tokens, self.since, self.ragged)

    def reading(self, start: int, stop: int, rows: Rows | None) -> Reading:
        """Return what the queries at places ``start`` to ``stop`` of the row read; ``rows`` as in ``visible_later``."""
        return self._once(f"reading {start}", (stop, rows), lambda asked: self._reading(start, stop, rows))

    def _reading(self, start: int, stop: int, rows: Rows | None) -> Reading:
        positions, valid = self._located(rows)
        if rows is None:
            query = torch.arange(start, stop, device=self.places.device)[None]
        else:
            query = rows.positions()[:, start:stop]
        seen = seen_by_head(self.heads, query[:, :, None], positions[:, None, :], self.tokens)
        if rows is not None:
            valid = (rows.segments[:, start:stop] >= 0)[:, :, None] & valid[:, None, :]
            seen = seen & valid[:, None]
        elif self.ragged:
            seen = seen & valid[:, None, None, :]
        read = seen.flatten(1, 2).any(1)
        held = self.places.shape[1]
        count = max(1, int(read.sum(1).max()))
        index, places = None, self.places
        if count <= GATHERED_SHARE * held:
            index = _first_true(read, count)
            places = places.expand(len(index), -1).gather(1, index)
            seen = seen.gather(3, index[:, None, None, :].expand(*seen.shape[:3], -1))
        return Reading(index, places, None if bool(seen.all()) else seen)

    def positions(self, rows: Rows | None) -> Tensor:
        """Return the position of each held token in its row, int64 ``[1 or B, K]``; -1 for padding and none."""
        positions, valid = self._located(rows)
        return torch.where(valid, positions, -1)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, rows: Rows | None, mask: Tensor | None,
        dropout: float, bias: DistanceBias | None = None,
    ) -> Tensor:  # fmt: skip
        """Return ``kept_attention`` over these tokens."""
        return kept_attention(query, key, value, self, scale, rows, mask, dropout, bias)

    def _located(self, rows: Rows | None) -> tuple[Tensor, Tensor]:
        """Return the position of each held token in its row without padding, and True where there is one."""
        valid = self.places >= 0
        if rows is None:
            return self.places, valid
        index = self.places.clamp_min(0).expand(len(rows.segments), -1)
        return rows.positions().gather(1, index), valid & (rows.segments.gather(1, index) >= 0)

    def _once(self, name: str, asked: Any, make: Any) -> Any:
        known = self._memo.get(name)
        if known is None or not _same(known[0], asked):
            known = self._memo[name] = (asked, make(asked))
        return known[1]


_firsts: WeakValueDictionary[Any, Kept] = WeakValueDictionary()


def _same(known: Any, asked: Any) -> bool:
    if isinstance(known, tuple):
        return all(_same(one, other) for one, other in zip(known, asked, strict=True))
    return known is asked or (isinstance(known, int) and known == asked)


def _first_true(chosen: Tensor, count: int) -> Tensor:
    """Return where each row of bool ``[R, K]`` is True, in order, int64 ``[R, count]``; others fill up short rows."""
    return chosen.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count]


def take_tokens(part: Tensor, index: Tensor) -> Tensor:
    """Return tokens ``index``, ``[1 or B, V]``, of keys or values ``[B, G, K, D]``, as ``[B, G, V, D]``."""
    if len(index) == 1:
        return part.index_select(2, index[0])
    return part.gather(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))


def kept_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kept: Kept,
    scale: float,
    rows: Rows | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
    bias: DistanceBias | None = None,
) -> Tensor:
    """Compute attention of the last queries over the keys that a cache holds.

    Queries that see less than half of these keys gather them first, so that the others are not read.

    Args:
        query: ``[B, H, N, D]``: the last N tokens of the row.
        key, value: ``[B, G, K, D]``: of the tokens that are held, the last N among them.
        kept: says which these are.
        scale: of the scores.
        rows: of all tokens so far; None if there is no padding.
        mask: bool (True: visible) or additive, ``[B or 1, H or 1, N, all tokens so far]``.
        dropout: share of the attention weights that is dropped.
        bias: what is added to scores by the distance of positions.

    Returns:
        ``[B, H, N, D]``; zero for a query that sees nothing (padding).
    """
    if mask is not None and mask.shape[-1] != kept.tokens:
        raise ValueError(f"the attention mask has {mask.shape[-1]} columns for {kept.tokens} tokens")
    counts = kept.heads.nearest
    if counts is not None and kept.run and query.shape[2] == 1 and rows is None and mask is None:
        return _attend_nearest(query, key, value, counts, scale, dropout, bias)
    begin = kept.tokens - query.shape[2]
    parts = []
    for start in range(begin, kept.tokens, QUERIES_AT_ONCE):
        stop = min(start + QUERIES_AT_ONCE, kept.tokens)
        reading = kept.reading(start, stop, rows)
        k, v = (key, value) if reading.index is None else (take_tokens(part, reading.index) for part in (key, value))
        some = None
        if mask is not None:
            some = _columns(mask[:, :, start - begin : stop - begin], reading.places)
        if bias is not None:
            added = bias(_distances(reading.places, start, stop, rows), None).transpose(0, 1)
            some = added if some is None else added + as_bias(some, added.dtype)
        parts.append(
            grouped_product(query[:, :, start - begin : stop - begin], k, v, reading.seen, some, scale, dropout)
        )
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend_nearest(
    query: Tensor, key: Tensor, value: Tensor, counts: tuple[int, ...], scale: float, dropout: float,
    bias: DistanceBias | None,
) -> Tensor:  # fmt: skip
    """Return ``kept_attention`` of one query over the end of a run of keys: the host knows which keys it sees."""
    held = min(max(counts), key.shape[2])
    key, value = key[:, :, -held:], value[:, :, -held:]
    seen = _seen_of(counts, held, query.device) if min(counts) < held else None
    mask = seen
    if bias is not None:
        added = bias(_behind(held, query.device), None)[None, :, None]
        mask = (added if seen is None else torch.where(seen, added, -torch.inf)).to(query.dtype)
    batch, heads, _, _ = query.shape
    shared = heads // key.shape[1]
    if shared > 1:
        query, mask = query.reshape(batch, key.shape[1], shared, -1), _by_group(mask, shared, 1)
    return dense_product(query, key, value, mask, dropout, scale=scale).reshape(batch, heads, 1, -1)


@kept_tensors(64)
def _behind(held: int, device: torch.device) -> Tensor:
    """Return how far the last ``held`` keys lie behind the query, int64 ``[held]``."""
    return torch.arange(held - 1, -1, -1, device=device)


@kept_tensors(64)
def _seen_of(counts: tuple[int, ...], held: int, device: torch.device) -> Tensor:
    """Return which of the last ``held`` keys heads see that see their ``counts`` nearest, bool ``[1, H, 1, held]``."""
    return (_behind(held, device) < torch.tensor(counts, device=device)[:, None])[None, :, None]


def _distances(places: Tensor, start: int, stop: int, rows: Rows | None) -> Tensor:
    """Return query minus key position of queries at places ``start`` to ``stop``, int64 ``[1 or B, n, V]``."""
    if rows is None:
        query = torch.arange(start, stop, device=places.device)[None]
        return query[:, :, None] - places[:, None, :]
    positions = rows.positions()
    index = places.clamp_min(0).expand(len(positions), -1)
    return positions[:, start:stop, None] - positions.gather(1, index)[:, None, :]


def _columns(mask: Tensor, places: Tensor) -> Tensor:
    rows = max(len(mask), len(places))
    index = places.clamp_min(0)[:, None, None, :].expand(rows, *mask.shape[1:3], -1)
    return mask.expand(rows, -1, -1, -1).gather(3, index)


def grouped_product(
    query: Tensor, key: Tensor, value: Tensor, seen: Tensor | None, mask: Tensor | None, scale: float, dropout: float
) -> Tensor:
    """Return the attention of a few queries, of which those that share a head of keys are queries of one head.

    So keys are not repeated. ``seen`` is bool and ``mask`` bool or additive, ``[1 or B, 1 or H, n, V]``; None for all.
    """
    batch, heads, count, _ = query.shape
    shared = heads // key.shape[1]
    if shared > 1:
        query = query.reshape(batch, key.shape[1], shared * count, -1)
        seen, mask = (_by_group(part, shared, count) for part in (seen, mask))
    if seen is None and mask is None:
        out = dense_product(query, key, value, None, dropout, scale=scale)
    else:
        seen = query.new_ones(1, 1, 1, key.shape[2], dtype=torch.bool) if seen is None else seen
        out = masked_attention(query, key, value, seen, mask, scale, dropout)
    return out.reshape(batch, heads, count, -1)


def _by_group(part: Tensor | None, shared: int, count: int) -> Tensor | None:
    """Return ``[B, H or 1, n or 1, V]`` as ``[B, G or 1, shared * n, V]``."""
    if part is None:
        return None
    part = part.expand(-1, -1, count, -1)
    if part.shape[1] == 1:
        return part.repeat(1, 1, shared, 1)
    return part.reshape(len(part), part.shape[1] // shared, shared * count, -1)
