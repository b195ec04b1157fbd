"""Keys of heads that see their nearest keys, in rings at fixed addresses: a captured step of a layer is two launches.

Each key/value head has as many slots as its query heads see at most, and those of the last few steps; the key of
position i is in slot ``i mod C``. So a step needs no tables of what is held: the kernel finds the keys of each head
from the position, with the ramp of a span, and writes the new key meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from .caches import HeldKeys
from .fixed_cache import kernel_module
from .head_caches import Groups
from .kept import take_tokens

KERNEL = "hf_optim_kernels.ring_attention.op"  # where it is installed
# Whether captured steps use rings.
USED = True


def _kernel() -> Any:
    return kernel_module(KERNEL)


def counts_in(held: Any) -> tuple[int, ...] | None:
    """Return how many nearest keys each query head of a layer sees, which holds keys by groups of heads.

    None if what its heads see are other keys than the nearest ones.
    """
    found: dict[int, int] = {}
    for part, group in zip(held.parts, held.groups, strict=True):
        counts = part.kept.heads.nearest
        if counts is None:
            return None
        shared = len(counts) // len(group)
        for place, count in enumerate(counts):
            found[group[place // shared] * shared + place % shared] = count
    return tuple(found[head] for head in range(len(found)))


def serves(held: Any, length: int, back: int) -> bool:
    """Return True if rings can take over a layer that holds keys by groups of heads; others as of ``RingLayer``."""
    if not USED or not getattr(held, "takes_rings", False) or not held.groups:
        return False
    op, counts = _kernel(), counts_in(held)
    if op is None or counts is None or not op.can_run_triton(held.parts[0].keys):
        return False
    heads = sum(map(len, held.groups))
    keys, values = (each.new_empty(0, heads, 1, each.shape[3]) for each in (held.parts[0].keys, held.parts[0].values))
    query = keys.new_empty(0, len(counts), 1, keys.shape[3])
    return op.unsupported(query, keys, values, min(max(counts), length) + back) is None


class RingTokens:
    """How many tokens each row has. The layers of a model share it, and the first one counts a step.

    Args:
        rows: of the batch.
        device: of the keys.

    Attributes:
        tokens: int64 ``[rows]``.
        begin: those before the first step.
    """

    def __init__(self, rows: int, device: torch.device) -> None:
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.begin = self.tokens

    def state(self) -> list[Tensor]:
        """Return the tensors that a step changes."""
        return [self.tokens]

    def load(self, tokens: Tensor) -> None:
        """Begin behind ``tokens [rows]``, int64."""
        self.begin = tokens.clone()
        self.tokens.copy_(tokens)


class RingLayer(DynamicLayer):
    """The keys and values of a layer in rings, one for each key/value head: see ``HeadGroupsLayer``.

    To the model it looks like a cache without earlier tokens: positions are passed by the caller, and there is no mask.

    Args:
        like: the layer that holds the keys of the prefill.
        tokens: shared by the layers.
        length: the most tokens of a row.
        back: how many tokens may be taken back: what they see stays.
        first: the step begins with this layer.

    Attributes:
        groups: of key/value heads, as in ``like``; those of a group have rings of one size.
        keys, values: ``[T, D]`` and ``[T, Dv]``: all rings.
    """

    keys: Any
    values: Any
    is_sliding = False
    is_compileable = False

    def __init__(self, like: Any, tokens: RingTokens, length: int, back: int, first: bool) -> None:
        super().__init__()
        counts = counts_in(like)
        assert counts is not None
        self.tokens, self.first, self.counts, self.back = tokens, first, counts, back
        self.groups: Groups = like.groups
        self.rows = len(tokens.tokens)
        self._new: tuple[Tensor, Tensor] | None = None
        heads = sum(map(len, self.groups))
        shared = len(counts) // heads
        self._sizes, rings, begin = [], [[0] * 4 for _ in range(heads)], 0
        for group in self.groups:
            seen = [min(max(counts[head * shared : (head + 1) * shared]), length) for head in group]
            size = min(max(seen) + back, length + 1)
            for place, (head, count) in enumerate(zip(group, seen, strict=True)):
                rings[head] = [begin + place * size, len(group) * size, size, count]
            self._sizes.append(size)
            begin += self.rows * len(group) * size
        part = like.parts[0]
        self.lazy_initialization(part.keys, part.values)
        self.keys, self.values = (each.new_zeros(begin, each.shape[3]) for each in (part.keys, part.values))
        self._op: Any = _kernel()
        device = self.keys.device
        self._rings = torch.tensor(rings, device=device)
        self._counts = torch.tensor(counts, dtype=torch.int32, device=device)
        self._items, self._merges = self._op.plan(rings, self.rows, device)

    def parts(self) -> list[tuple[Tensor, Tensor]]:
        """Return keys and values of each group, ``[rows, heads, slots, D]``, as views of the rings."""
        found, begin = [], 0
        for group, size in zip(self.groups, self._sizes, strict=True):
            shape = self.rows, len(group), size, -1
            end = begin + self.rows * len(group) * size
            found.append((self.keys[begin:end].view(shape), self.values[begin:end].view(shape)))
            begin = end
        return found

    def load(self, held: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fill the rings with keys and values ``[n, G, K, D]`` of each group, and their positions ``[1 or n, K]``.

        Positions are -1 for none. Later rows get those of the first one. Slots without a key are not read, whatever
        they hold.
        """
        self._new = None
        for mine, (keys, values, positions) in zip(self.parts(), held, strict=True):
            size, rows = mine[0].shape[2], len(keys)
            places = positions % size
            for rings, given in zip(mine, (keys, values), strict=True):
                if len(positions) == 1:  # rows hold the same, and none of it is missing
                    rings[:rows].index_copy_(2, places[0], given)
                else:  # what is missing goes behind the slots
                    room = rings.new_empty(rows, given.shape[1], size + 1, given.shape[3])
                    index = torch.where(positions < 0, size, places)[:, None, :, None]
                    room.scatter_(2, index.expand(given.shape), given)
                    rings[:rows].copy_(room[:, :, :size])
                if rows < self.rows:
                    rings[rows:].copy_(rings[:1].expand_as(rings[rows:]))

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Return the key and value ``[rows, G, 1, D]`` of a new token, which the attention function then hands over."""
        if self.first:
            self.tokens.tokens.add_(1)
        self._new = key_states, value_states
        return HeldKeys.of(key_states, self), value_states  # type: ignore[arg-type]

    def attend_nearest(
        self, query: Tensor, counts: Sequence[int], bias: Any, scale: float, rows: Any, mask: Tensor | None,
        dropout: float,
    ) -> Tensor:  # fmt: skip
        """Return the attention of the step's query ``[rows, H, 1, D]``, and keep its key and value.

        Args:
            counts: how many nearest keys each head sees.
            bias: ``z``, ``size`` and ``over`` of its ramp, as ``SpanBias`` has them; None without one.
            scale: of the scores.
            rows, mask, dropout: None, None and 0: padding is known from the positions.

        Raises ``ValueError`` for others, and for counts that the rings were not made for.
        """
        if tuple(counts) != self.counts or rows is not None or self._new is None:
            raise ValueError("the rings of this cache are those of other spans or another batch")
        if mask is not None or dropout:
            raise ValueError("a captured step under spans has no mask of its own (a window), and no dropout")
        (key, value), self._new = self._new, None
        shares, size, ramp = (None, 1, 1) if bias is None else (bias.z.detach().float(), bias.size, bias.over)
        out = self._op.ring_attention(
            query[:, :, 0], key[:, :, 0], value[:, :, 0], self.keys, self.values, self.tokens.tokens, self._rings,
            self._counts, shares, self._items, self._merges, size, ramp, float(scale),
        )  # fmt: skip
        return out[:, :, None]

    def first_tokens(self, count: int) -> list[tuple[Tensor, Tensor]]:
        """Return for each group keys and values ``[rows, G, count, D]`` of the first steps; zero for what is gone."""
        places = self.tokens.begin[:, None] + torch.arange(count, device=self.keys.device)
        found = []
        for mine in self.parts():
            size = mine[0].shape[2]
            gone = (places < self.tokens.tokens[:, None] - size)[:, None, :, None]
            keys, values = (take_tokens(part, places % size).masked_fill(gone, 0) for part in mine)
            found.append((keys, values))
        return found

    def get_seq_length(self) -> int:
        """Return 0: no mask covers the tokens in the rings."""
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of a mask of the new tokens alone."""
        return query_length, 0
