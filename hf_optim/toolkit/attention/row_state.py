"""What attention that keeps a state is given of a batch: rows that begin at place 0, and the state of each row.

Padding is moved to the end of the rows, and documents of packed rows into rows of their own, so that an attention with
a state of its own (memories, sums of features, clusters) counts tokens and nothing else.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .rows import UNWRITTEN, Apart, Rows


class TensorState(dict[str, Tensor]):
    """Named tensors, each with the rows of the batch first: what an attention keeps of the earlier tokens."""

    @property
    def rows(self) -> int:
        """Rows of the batch."""
        return len(next(iter(self.values())))

    def of_rows(self, index: Tensor) -> TensorState:
        """Return the state of chosen rows, int64 ``[rows]``."""
        return TensorState({name: part.index_select(0, index.to(part.device)) for name, part in self.items()})

    def to(self, device: Any) -> TensorState:
        """Return the state on a device."""
        return TensorState({name: part.to(device, non_blocking=True) for name, part in self.items()})

    def nbytes(self) -> int:
        """Return the bytes of all tensors."""
        return sum(part.numel() * part.element_size() for part in self.values())


@dataclass(frozen=True, eq=False)
class Call:
    """One call of an attention, over rows that begin at place 0 and have their padding, if any, at the end.

    Attributes:
        module: the attention of transformers, whose ``learned`` part computes.
        query: ``[R, H, P, D]``, after the rotary embedding of the model, if it has one.
        key, value: ``[R, G, P, D]`` of the same tokens.
        lengths: int64 ``[R]``: valid tokens of each row, which may be 0; None: all P.
        earlier: tokens of each row that were read before, int64 ``[R]``; None: no row has any.
        causal: keys behind a query are not seen.
        scale: of the scores.
        dropout: share of the weights that is dropped; 0 unless the model is training.
        layer: the number of the attention in the model.
        state: what is kept of the earlier tokens; None before the first.
        keeps: a cache waits for the new state.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    lengths: Tensor | None
    earlier: Tensor | None
    causal: bool
    scale: float
    dropout: float
    layer: int
    state: TensorState | None
    keeps: bool

    @property
    def training(self) -> bool:
        """True if the model is training."""
        return self.module.training

    @property
    def valid(self) -> Tensor | None:
        """Bool ``[R, P]``: True for tokens, False for padding at the end of a row; None if there is no padding."""
        if self.lengths is None:
            return None
        return torch.arange(self.query.shape[2], device=self.query.device) < self.lengths[:, None]

    def of_heads(self, part: Tensor) -> Tensor:
        """Return keys or values ``[R, G, ...]`` for each query head, ``[R, H, ...]``."""
        groups = self.query.shape[1] // part.shape[1]
        return part if groups == 1 else part.repeat_interleave(groups, 1)


@dataclass(frozen=True, eq=False)
class NewTokens:
    """The tokens of a forward, and how their rows are moved.

    Attributes:
        begin: place of the first of them in the rows.
        earlier, counts: tokens of each row before ``begin``, and of the new ones, without padding.
        earlier_marks, marks: a number for the places of each row before ``begin``, and of all, that are padding; 0 for
            none.
        valid: bool ``[B, N]``: True for new tokens, False for padding; None if there is no padding.
        documents: those of packed rows.
    """

    begin: int
    earlier: tuple[int, ...]
    counts: tuple[int, ...]
    earlier_marks: tuple[int, ...]
    marks: tuple[int, ...]
    valid: Tensor | None = None
    documents: Apart | None = None

    @classmethod
    def read(cls, handed: Tensor | None, query: Tensor, seen: int | None) -> NewTokens:
        """Return what is meant by ``handed``, the result of the mask function.

        Args:
            handed: ``SEGMENTS`` ``[B, 1, 1, M]``, or None.
            query: ``[B, H, N, D]`` of the new tokens.
            seen: tokens that a cache has read, padding included; None without a cache.

        Raises ``ValueError`` if the mask is not that of these tokens.
        """
        batch, count = len(query), query.shape[2]
        begin = seen or 0
        plain = cls(begin, (begin,) * batch, (count,) * batch, (0,) * batch, (0,) * batch)
        if handed is None:
            return plain
        rows: Rows | None = getattr(handed, "hf_optim_rows", None)  # lost where the tensor was copied
        segments = handed[:, 0, 0].int()
        if rows is None:
            rows = Rows.of(segments, int((segments[0] != UNWRITTEN).sum()) - count)
        if rows.offset != begin:
            raise ValueError(
                f"this attention keeps the state of {begin} tokens, and the mask says that {rows.offset} came before: "
                "use the cache that the model makes, with the attention_mask of all tokens"
            )
        if rows.plain:
            return plain
        known: dict[int, NewTokens] = vars(handed).setdefault("hf_optim_new_tokens", {})
        if begin not in known:
            known[begin] = cls._of_segments(segments[:, : begin + count], begin, seen is not None)
        return known[begin]

    @classmethod
    def _of_segments(cls, segments: Tensor, begin: int, cached: bool) -> NewTokens:
        """Return what segments ``[B, begin + N]`` mean. This waits for the device."""
        valid = segments >= 0
        padding = torch.where(valid, 0, _marks_of_places(valid.shape[1], valid.device))
        facts = [valid[:, :begin].sum(1), valid[:, begin:].sum(1), padding[:, :begin].sum(1), padding.sum(1)]
        earlier, counts, earlier_marks, marks = (tuple(each) for each in torch.stack(facts).tolist())
        documents = None
        if bool((segments > 0).any()):
            if cached:
                raise ValueError("rows of several documents have no cache: set use_cache=False")
            documents = Apart.of(Rows.of(segments))
        new = valid[:, begin:]
        whole = sum(counts) == new.numel()
        return cls(begin, earlier, counts, earlier_marks, marks, None if whole else new, documents)

    def take(self, part: Tensor) -> Tensor:
        """Return ``[B, H, N, D]`` as rows that begin at place 0, ``[R, H, P, D]``."""
        if self.documents is not None:
            return self.documents.take(part)
        if self.valid is None:
            return part
        places = (~self.valid).to(torch.int8).argsort(dim=1, stable=True)[:, : max(1, *self.counts)]
        return part.gather(2, places[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))

    def put(self, part: Tensor, batch: int) -> Tensor:
        """Return ``[R, H, P, D]`` as ``[B, H, N, D]``, zero at padding."""
        if self.documents is not None:
            return self.documents.put(part, batch)
        if self.valid is None:
            return part
        places = (self.valid.cumsum(1) - 1).clamp_min(0)
        found = part.gather(2, places[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3]))
        return found.masked_fill(~self.valid[:, None, :, None], 0)

    def lengths(self, device: torch.device) -> Tensor | None:
        """Return the valid tokens of each row that ``take`` returns, int64 ``[R]``; None if all are valid."""
        if self.documents is not None:
            return self.documents.lengths()
        return None if self.valid is None else self.valid.sum(1)

    def earlier_tokens(self, device: torch.device) -> Tensor | None:
        """Return the tokens of each row before the new ones, int64 ``[R]``; None if there are none."""
        return torch.tensor(self.earlier, device=device) if self.begin else None


def _marks_of_places(count: int, device: torch.device) -> Tensor:
    """Return a pseudorandom number for each place, int64 ``[count]``, of which sums tell sets of places apart."""
    mixed = torch.arange(1, count + 1, device=device) * 1_103_515_245 % (2**31 - 1)
    mixed = mixed ^ (mixed >> 13)
    return mixed * mixed % (2**31 - 1)
