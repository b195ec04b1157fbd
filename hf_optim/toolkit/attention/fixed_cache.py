"""A key/value cache of what a pattern sees at addresses and with shapes that do not change, for captured steps.

A layer has as many slots as keys can be visible to a later token at any time, and the tokens of the last few steps. The
key of a new token replaces one that no later token sees; which one, and what a query sees, is computed on the device
from the positions of the keys in the slots. Layers with the same patterns share both.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .blocked import DistanceBias
from .cached_tokens import expiries, most_seen, tokens_kept
from .caches import HeldKeys, PatternLayer
from .head_caches import Groups, of_group
from .head_patterns import HeadPatterns
from .kept import GATHERED_SHARE, NO_LIMIT, grouped_product, take_tokens
from .rows import Rows

KERNEL = "hf_optim_kernels.decode_attention.op"  # where it is installed
EMPTY = -1


@cache
def kernel_module(name: str) -> Any:
    """Return the module of a kernel; None where it is not installed."""
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


class Slots:
    """Which tokens the layers of a pattern hold: shapes are fixed, and the contents are computed on the device.

    Args:
        heads: the patterns of these layers, of a causal model.
        rows: rows of the batch.
        length: the most tokens of a row.
        back: how many tokens may be taken back: what they see stays.
        device: of the keys.

    Attributes:
        count: how many keys a layer holds.
        width: how many keys a step reads, of those it holds.
        tokens: what ``Attachment.attention`` compares with the number of queries: there are keys besides the query's.
    """

    tokens = 2

    def __init__(self, heads: HeadPatterns, rows: int, length: int, back: int, device: torch.device) -> None:
        self.heads, self.length = heads, length
        self.count = min(tokens_kept(heads, length) + back, length) + 1
        self.width = min(most_seen(heads, length), self.count)
        self._expires = (expiries(heads, length) + back).to(device)
        self.position = torch.zeros((rows, 1), dtype=torch.int64, device=device)  # of the next token
        self.begin = self.position  # the one before the first step
        self.positions = torch.full((rows, self.count), EMPTY, dtype=torch.int64, device=device)
        self._until = torch.full_like(self.positions, EMPTY)  # the first position for which a slot may be used again
        # Of the running step: the slot of its token, what its query sees, and where it is read from.
        self.slot = torch.zeros_like(self.position)
        self._pattern_of = torch.tensor(heads.heads, device=device)  # made here: a capture copies nothing from the host
        self._seen: Tensor | None = None
        self._index: Tensor | None = None
        self._ranges: Tensor | None = None
        self._away: Tensor | None = None

    def state(self) -> list[Tensor]:
        """Return the tensors that a step changes."""
        return [self.position, self.positions, self._until]

    def load(self, positions: Tensor, tokens: Tensor) -> None:
        """Fill the first slots with keys at ``positions [rows, K]`` (-1 for none) of rows of ``tokens [rows]``.

        Raises ``ValueError`` for more keys than there are slots.
        """
        held = positions.shape[1]
        if held > self.count:
            raise ValueError(f"{held} keys are visible, and there is room for {self.count}")
        self.begin = tokens[:, None]
        self.position.copy_(self.begin)
        self.positions.fill_(EMPTY)
        self.positions[:, :held] = positions
        self._until.copy_(torch.where(self.positions < 0, EMPTY, self._expires[self.positions.clamp_min(0)]))

    def step(self) -> None:
        """Give the next token of each row a slot, and find what it sees."""
        self.slot = self._until.argmin(1, keepdim=True)
        self.positions.scatter_(1, self.slot, self.position)
        self._until.scatter_(1, self.slot, self._expires[self.position.clamp_max(self.length - 1)])
        seen = self._sees()
        self._index = self._ranges = self._away = None
        if self.width <= GATHERED_SHARE * self.count:
            read = seen.flatten(1, 2).any(1)
            place = torch.where(read, read.cumsum(1) - 1, self.width)  # those that are not read go to the last column
            every = torch.arange(self.count, device=place.device).expand_as(place)
            index = torch.zeros_like(place[:, : self.width + 1]).scatter_(1, place, every)
            self._index = index[:, : self.width]
            there = torch.arange(self.width, device=place.device) < read.sum(1, keepdim=True)
            seen = seen.gather(3, self._index[:, None, None, :].expand(*seen.shape[:3], -1)) & there[:, None, None, :]
        self._seen = seen
        self.position.add_(1)

    def _distances(self) -> Tensor:
        """Return how far the keys that are read lie behind the query, int64 ``[rows, 1, keys]``."""
        if self._away is None:
            held = self.positions if self._index is None else self.positions.gather(1, self._index)
            self._away = (self.position - 1 - held)[:, None, :]
        return self._away

    def _sees(self) -> Tensor:
        """Return which slots each head sees in this step, bool ``[rows, H or 1, 1, slots]``."""
        query, key = self.position[:, :, None], self.positions[:, None, :]
        seen = [pattern.sees(query, key, NO_LIMIT).expand_as(key) for pattern in self.heads.patterns]
        found = torch.stack(seen, 1) & (key >= 0)[:, None]
        return found if len(seen) == 1 else found.index_select(1, self._pattern_of)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float, rows: Rows | None, mask: Tensor | None,
        dropout: float, bias: DistanceBias | None = None,
    ) -> Tensor:  # fmt: skip
        """Return the attention of the step's queries ``[B, H, 1, D]`` over the slots of a layer; see ``Kept.attend``.

        Raises ``ValueError`` for a mask: padding is known from the positions.
        """
        if mask is not None:
            raise ValueError(
                "the model has a mask of its own (a window), which a captured step under a pattern has not"
            )
        if dropout:
            raise ValueError("a captured step has no dropout")
        assert self._seen is not None
        if self._index is not None:
            key, value = take_tokens(key, self._index), take_tokens(value, self._index)
        if bias is not None:
            added = bias(self._distances(), None).transpose(0, 1)
            return grouped_product(query, key, value, self._seen, added, scale, 0.0)
        op = kernel_module(KERNEL)
        if op is None or op.unsupported(query, key, value, self._seen) or not op.can_run_triton(query):
            return grouped_product(query, key, value, self._seen, None, scale, 0.0)
        if self._ranges is None:
            self._ranges = op.mask_ranges(self._seen)
        out = op.decode_attention(query, key, value, self._seen, self._ranges, None, float(scale), 0.0)
        return out.transpose(1, 2)


class FixedLayer(DynamicLayer):
    """The keys and values of a layer, or of some of its heads, in slots, at addresses that do not change.

    To the model it looks like a cache without earlier tokens: positions are passed by the caller, and there is no mask.

    Attributes:
        keys, values: ``[rows, G, slots, D]``.
        slots: which tokens these are.
        first: the step begins with this layer, of those that share the slots.
    """

    keys: Any
    values: Any
    is_sliding = False
    is_compileable = False

    def __init__(self, slots: Slots, like: PatternLayer, rows: int, first: bool) -> None:
        super().__init__()
        self.slots, self.first = slots, first
        self.lazy_initialization(like.keys, like.values)
        shape = (rows, like.keys.shape[1], slots.count)
        self.keys, self.values = (part.new_zeros((*shape, part.shape[3])) for part in (like.keys, like.values))

    def load(self, keys: Tensor, values: Tensor) -> None:
        """Fill the first slots with keys and values ``[n, G, K, D]``; later rows get those of the first one."""
        for mine, theirs in ((self.keys, keys), (self.values, values)):
            mine.zero_()  # what is masked is multiplied by zero, and must be a number
            mine[: len(theirs), :, : theirs.shape[2]].copy_(theirs)
            mine[len(theirs) :, :, : theirs.shape[2]].copy_(theirs[:1])

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add the key and value ``[rows, G, 1, D]`` of a new token, and return those of all slots."""
        if self.first:
            self.slots.step()
        for mine, new in ((self.keys, key_states), (self.values, value_states)):
            mine.scatter_(2, self.slots.slot[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3]), new)
        return HeldKeys.of(self.keys, self), self.values  # type: ignore[arg-type]

    def settle(self, heads: HeadPatterns, rows: Rows | None) -> Slots:
        """Return which tokens are held. Raises ``ValueError`` for other patterns, and if padding is told."""
        if heads != self.slots.heads or rows is not None:
            raise ValueError("the slots of this cache are those of another pattern or batch")
        return self.slots

    def first_tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """Return keys and values ``[rows, G, count, D]`` of the first steps; zero for those that are gone."""
        positions, slots = self.slots.positions, self.slots
        where = torch.full((len(positions), slots.length + 2), EMPTY, device=positions.device)
        every = torch.arange(slots.count, device=positions.device).expand_as(positions)
        where.scatter_(1, torch.where(positions < 0, slots.length + 1, positions), every)
        index = where.gather(1, slots.begin + torch.arange(count, device=positions.device))
        gone = (index < 0)[:, None, :, None]
        keys, values = (take_tokens(part, index.clamp_min(0)) for part in (self.keys, self.values))
        return keys.masked_fill(gone, 0), values.masked_fill(gone, 0)

    def get_seq_length(self) -> int:
        """Return 0: no mask covers the tokens in the slots."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask of the new tokens alone."""
        return query_length, 0


class FixedGroupsLayer(DynamicLayer):
    """The keys and values of a layer by groups of heads, each in slots of its own: see ``HeadGroupsLayer``.

    Attributes:
        parts, groups: one layer for each group of key/value heads.
        fresh: False: there are earlier tokens.
    """

    is_sliding = False
    is_compileable = False
    fresh = False

    def __init__(self, parts: list[FixedLayer], groups: Groups) -> None:
        super().__init__()
        self.parts, self.groups = parts, groups
        self.lazy_initialization(parts[0].keys, parts[0].values)
        self._new: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the key and value ``[rows, G, 1, D]`` of a new token, which the attention function then takes."""
        self._new = key_states, value_states
        return HeldKeys.of(key_states, self), value_states  # type: ignore[arg-type]

    def take(self, groups: Groups) -> Iterator[tuple[FixedLayer, Tensor, Tensor]]:
        """Give the new token to the parts, and yield each with the keys and values of all its slots.

        Raises ``ValueError`` if the cache has other groups.
        """
        if groups != self.groups or self._new is None:
            raise ValueError("the slots of this cache are those of other groups of heads")
        (key, value), self._new = self._new, None
        for part, group in zip(self.parts, groups, strict=True):
            keys, values = part.update(of_group(key, group, groups), of_group(value, group, groups))
            yield part, keys.plain(), values  # type: ignore[attr-defined]

    def get_seq_length(self) -> int:
        """Return 0: no mask covers the tokens in the slots."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask of the new tokens alone."""
        return query_length, 0
