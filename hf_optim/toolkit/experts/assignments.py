"""In training, sequences whose assignment to experts no longer changes keep it, and their router is not computed.

A sequence is known by its tokens. Once its choices were the same ``stable`` times in a row, its choices and gates are
those of the last time: then its tokens give the router no gradient. After four times as many uses they are computed
again; if they differ, the count starts from 0.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..modules.swap_class import restore_class, subclass_of, swap_class
from .choices import recomputing

MAX_SEQUENCES = 65536
"""Sequences that a layer knows; the one that was not seen for the longest time is forgotten."""

RECHECK = 4
SKIPPER, BATCH = "_hf_optim_assignments", "_hf_optim_batch"


@dataclass(eq=False)
class Batch:
    """The sequences that run through a part of a model.

    Attributes:
        ids: int ``[B, N]``; None if the model gets no token ids.
        mask: ``[B, N]``, or None.
        keys: a hash of each sequence, once it was asked for.
    """

    ids: Tensor | None = None
    mask: Tensor | None = None
    keys: list[bytes] | None = None

    def note(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Take note of a batch, as a hook before the forward."""
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        known = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
        self.ids, self.keys = ids if known else None, None
        self.mask = mask if isinstance(mask, Tensor) and known and mask.shape == ids.shape else None  # type: ignore[union-attr]

    def keys_of(self, tokens: int) -> list[bytes] | None:
        """Return the hashes of the sequences; None if ``tokens`` are not those of this batch."""
        if self.ids is None or self.ids.numel() != tokens or not tokens:
            return None
        if self.keys is None:
            ids = self.ids if self.mask is None else self.ids.masked_fill(self.mask == 0, -1)
            rows = ids.detach().to("cpu", torch.int64).contiguous().numpy()
            self.keys = [hashlib.blake2b(row.tobytes(), digest_size=16).digest() for row in rows]
        return self.keys


@dataclass(eq=False)
class Entry:
    """What is known of a sequence: choices int64 ``[N, k]``, gates ``[N, k]``, equal times in a row, uses."""

    chosen: Tensor
    gates: Tensor
    same: int = 0
    used: int = 0


class Skipper:
    """The assignments that one router keeps.

    Attributes:
        stable: equal assignments in a row after which a router is not computed.
        computed, skipped: sequences so far.
    """

    def __init__(self, stable: int, batch: Batch) -> None:
        self.stable, self.batch = stable, batch
        self.entries: OrderedDict[bytes, Entry] = OrderedDict()
        self.computed = self.skipped = 0
        self.last: list[Entry | None] = []

    def forward(self, router: Any, former: Any, hidden: Tensor) -> Any:
        """Return (logits ``[T, E]``, gates ``[T, k]``, choices ``[T, k]``); logits that were not computed are NaN."""
        flat = hidden.reshape(-1, hidden.shape[-1])
        keys = self.batch.keys_of(len(flat)) if router.training and torch.is_grad_enabled() else None
        if keys is None:
            return former.forward(router, hidden)
        again = recomputing()  # gradient checkpointing must repeat what the forward did
        kept = self.last if again and len(self.last) == len(keys) else [self._kept(key) for key in keys]
        self.last = kept
        rows = flat.view(len(keys), -1, flat.shape[1])
        length = rows.shape[1]
        open_ = [place for place, entry in enumerate(kept) if entry is None]
        computed = former.forward(router, rows[open_].reshape(-1, flat.shape[1])) if open_ else None
        if not again:
            self.computed, self.skipped = self.computed + len(open_), self.skipped + len(keys) - len(open_)
            if computed is not None:
                self._observe([keys[place] for place in open_], computed[1].detach(), computed[2], length)
        if len(open_) == len(keys):
            return computed
        return self._assembled(kept, computed, length, router, flat)

    def _kept(self, key: bytes) -> Entry | None:
        entry = self.entries.get(key)
        if entry is None or entry.same < self.stable:
            return None
        entry.used += 1
        if entry.used > RECHECK * self.stable:
            entry.used = 0
            return None
        self.entries.move_to_end(key)
        return entry

    def _observe(self, keys: Sequence[bytes], gates: Tensor, chosen: Tensor, length: int) -> None:
        for place, key in enumerate(keys):
            part = slice(place * length, (place + 1) * length)
            entry = self.entries.pop(key, None)
            if entry is not None and torch.equal(entry.chosen, chosen[part]):
                entry.same, entry.gates = entry.same + 1, gates[part].clone()
            else:
                entry = Entry(chosen[part].clone(), gates[part].clone(), same=1)
            self.entries[key] = entry
        while len(self.entries) > MAX_SEQUENCES:
            self.entries.popitem(last=False)

    @staticmethod
    def _assembled(
        kept: Sequence[Entry | None], computed: Any, length: int, router: Any, flat: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        fresh = iter(zip(*(part.split(length) for part in computed), strict=True)) if computed is not None else iter(())
        unknown = flat.new_full((length, router.weight.shape[0]), float("nan"))
        rows = [next(fresh) if entry is None else (unknown, entry.gates, entry.chosen) for entry in kept]
        dtype = rows[0][0].dtype if computed is None else computed[0].dtype
        logits, gates, chosen = (list(part) for part in zip(*rows, strict=True))
        return torch.cat([part.to(dtype) for part in logits]), torch.cat(gates), torch.cat(chosen)


def skip_stable(router: nn.Module, stable: int, batch: Batch) -> Skipper:
    """Let a router keep assignments that do not change, by changing its class in place. Undone by ``skip_none``."""
    skipper = Skipper(stable, batch)
    former: Any = type(router)
    swap_class(router, _skipping(former), **{SKIPPER: skipper})
    return skipper


def skip_none(router: nn.Module) -> None:
    """Undo ``skip_stable``."""
    restore_class(router)


def skipper_of(router: nn.Module) -> Skipper | None:
    """Return what a router keeps; None for another module."""
    return vars(router).get(SKIPPER)


@functools.cache
def _skipping(former: Any) -> Any:
    """Return the subclass of a class of routers that keeps assignments."""

    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return former.forward(self, hidden_states, *args, **kwargs)
        return vars(self)[SKIPPER].forward(self, former, hidden_states)

    return subclass_of(former, forward, _rebuild)


def _rebuild(former: Any) -> Any:
    """Return an empty router of the subclass, for copies and pickles of a model."""
    cls = _skipping(former)
    return cls.__new__(cls)


def returns_choices(router: nn.Module, width: int, top_k: int | None) -> bool:
    """Return True if a router returns logits, gates and choices of its tokens, as those that can be skipped do."""
    weight = router._parameters.get("weight")
    if weight is None or weight.device.type == "meta":
        return weight is not None
    try:
        with torch.no_grad():
            found = router(torch.zeros(3, width, dtype=weight.dtype, device=weight.device))
    except (RuntimeError, TypeError, ValueError):
        return False
    shapes = isinstance(found, tuple) and len(found) == 3 and all(isinstance(part, Tensor) for part in found)
    return shapes and [len(part) for part in found] == [3, 3, 3] and found[1].shape == found[2].shape
