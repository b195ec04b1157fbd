"""The pattern of ``big_bird``: blocks in a window, at both ends and at random. Stored beside checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hf_optim.toolkit.attention import (
    GlobalAttachment,
    Pattern,
    PatternConfig,
    Spans,
    Term,
    chosen,
    differ_by_row,
    flag,
    kept_tensors,
    static_tokens,
    whole,
    with_static,
)

RANDOM = ("stored", "tf_eval")
LARGEST_SEED = 2**31 - 1
ROWS_AT_ONCE = 256  # of the table of hashes
SEEN_BY_ALL = 5  # blocks that a query sees without random ones: three of the window, the first and the last


def scrambled(number: Tensor) -> Tensor:
    """Return a hash of each number, 32 bits in int64: the same on every device and in every version of torch."""
    number = number ^ (number >> 16)
    number = number * 0x21F0AAAD & 0xFFFFFFFF
    number = number ^ (number >> 15)
    number = number * 0x735A2D97 & 0xFFFFFFFF
    return number ^ (number >> 15)


@dataclass(frozen=True)
class NeighboursAndRandom(Term):
    """Blocks of ``block`` tokens: the first and the last see all and are seen by all; others see both neighbours.

    They also see ``random`` further blocks: those with the smallest hash of seed, layer, head and both blocks among all
    blocks of the row, which is a uniform choice without repetition. So a longer text replaces some of the choices of a
    shorter one, and changes none otherwise. Up to ``5 + 2 random`` blocks, all see all, as in transformers.
    """

    block: int
    random: int
    limit: int
    seed: int = 0
    layer: int = 0
    head: int = 0

    @property
    def reads_length(self) -> bool:
        return True

    @property
    def length_step(self) -> int:
        return self.block

    def sees(self, query: Tensor, key: Tensor, length: Any) -> Tensor:
        if isinstance(length, Tensor):  # rows of different lengths
            shape = torch.broadcast_shapes(query.shape, key.shape, length.shape)
            found = torch.zeros(shape, dtype=torch.bool, device=key.device)
            blocks = (length + self.block - 1) // self.block
            for count in blocks.unique().tolist():
                found = found | ((blocks == count) & self.sees(query, key, count * self.block))
            return found
        if not length:
            return torch.zeros(torch.broadcast_shapes(query.shape, key.shape), dtype=torch.bool, device=key.device)
        return self._looked_up(query, key, block_table(self, -(-length // self.block)).to(key.device))

    def _looked_up(self, query: Tensor, key: Tensor, table: Tensor) -> Tensor:
        count = len(table)
        rows, columns = (each.div(self.block, rounding_mode="floor").clamp(0, count - 1) for each in (query, key))
        return table[rows, columns]

    def traceable(self, length: int, device: torch.device | str) -> Callable[[Tensor, Tensor], Tensor]:
        table = block_table(self, -(-length // self.block)).to(device)
        return lambda query, key: self._looked_up(query, key, table)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        count = -(-length // self.block)
        table = block_table(self, count).to(first.device)
        low, high = first // self.block, (last // self.block).clamp_max(count - 1)
        seen = torch.zeros(len(first), count, dtype=torch.bool, device=first.device)
        for step in range(int((high - low).max()) + 1):
            at = torch.minimum((low + step).clamp_max(count - 1), high)
            seen = seen | table[at]
        edge = torch.nn.functional.pad(seen.int(), (1, 1)).diff(dim=1)
        begins, ends = edge == 1, edge == -1
        nth, mth = begins.cumsum(1), ends.cumsum(1)
        found = []
        for run in range(1, int(begins.sum(1).max()) + 1):
            begin, end = ((hit & (number == run)).int().argmax(1) for hit, number in ((begins, nth), (ends, mth)))
            found.append((begin * self.block, end * self.block))
        return found

    def holds_all(self, length: int, causal: bool) -> bool:
        return -(-length // self.block) <= self.limit


@kept_tensors(256)
def block_table(term: NeighboursAndRandom, count: int) -> Tensor:
    """Return which blocks see which in a row of ``count`` blocks, bool ``[count, count]``."""
    if count <= term.limit:
        return torch.ones(count, count, dtype=torch.bool)
    place = torch.arange(count)
    ends = (place == 0) | (place == count - 1)
    table = ((place[:, None] - place).abs() <= 1) | ends[:, None] | ends
    if term.random:
        start = torch.tensor(term.seed)
        for part in (term.layer, term.head):
            start = scrambled(start) ^ part
        for rows in place.split(ROWS_AT_ONCE):
            hashes = scrambled(scrambled(scrambled(start) ^ rows)[:, None] ^ place)
            hashes = hashes.masked_fill(table[rows], 2**32)
            nearest = torch.sort(hashes, dim=1, stable=True).indices[:, : term.random]
            picked = torch.zeros(len(rows), count, dtype=torch.bool).scatter_(1, nearest, True)
            table[rows] |= picked & ~ends[rows, None]
    return table


@dataclass(frozen=True)
class FirstBlockAgain(Term):
    """The first block, seen by all blocks but the first and the last of a row with more than ``limit`` blocks."""

    block: int
    limit: int

    @property
    def reads_length(self) -> bool:
        return True

    @property
    def length_step(self) -> int:
        return self.block

    def sees(self, query: Tensor, key: Tensor, length: Any) -> Tensor:
        last = (length - 1) // self.block
        middle = (query >= self.block) & (query // self.block < last)
        return (key < self.block) & middle & (last >= self.limit)

    def spans(self, first: Tensor, last: Tensor, length: int) -> Spans:
        return [(torch.zeros_like(first), torch.full_like(first, self.block))]


def near(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of blocks: one for all heads, or one for each."""
    block, random = whole(settings, "block", low=1), whole(settings, "random", high=1024)
    seed, limit = whole(settings, "seed", high=LARGEST_SEED), SEEN_BY_ALL + 2 * random
    by_head = flag(settings, "by_head")
    if chosen(settings, "choice", RANDOM) == "tf_eval":
        if differ_by_row(settings) or static_tokens(settings) is not None:
            raise ValueError("the attention pattern is that of transformers' evaluation, which has no global tokens")
        repeats = ((FirstBlockAgain(block, limit), random),) if random else ()
        return [Pattern((NeighboursAndRandom(block, 0, limit),), causal, repeats)]
    if not random:  # nothing is drawn, so layers are alike
        return [Pattern((NeighboursAndRandom(block, 0, limit),), causal)]
    each = range(heads) if by_head else (0,)
    return [Pattern((NeighboursAndRandom(block, random, limit, seed, layer, head),), causal) for head in each]


def build(settings: Mapping[str, Any], layer: int, heads: int, causal: bool) -> list[Pattern]:
    """Return the pattern of blocks with the further global tokens at fixed positions."""
    return with_static(settings, near(settings, layer, heads, causal))


ATTACHMENT = GlobalAttachment("hf_optim_big_bird", build, near=near)


class BigBirdBase(PatternConfig):
    """Base of the configuration classes."""

    attachment = ATTACHMENT
