"""The ring: blocks are fetched into a few buffers on the device, each always into the same one.

    slot of the n-th streamed block = n mod (ahead + 1)

So addresses never change, memory never grows, and a block may be fetched as soon as the one before it in its slot has
computed. What comes next is what came next the last time; a wrong guess costs one wait, never a wrong result, since a
block that is entered without being in its slot is fetched then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .files import Piece, Reader
from .links import Link
from .tensors import Unit


@dataclass
class Stored:
    """Where the bytes of a block are kept.

    Attributes:
        units: its tensors.
        size: bytes of its buffer.
        memory: the buffer in host memory; None for a block on disk.
        pieces: what is read from disk.
    """

    units: list[Unit]
    size: int
    memory: Tensor | None = None
    pieces: list[Piece] = field(default_factory=list)

    def unit_memory(self, unit: Unit) -> Tensor:
        """Return the bytes of a unit on the CPU, in a storage of their own; from disk they are mapped, not read."""
        if self.memory is not None:
            import torch

            return torch.from_numpy(self.memory[unit.begin : unit.end].numpy())
        piece = next(each for each in self.pieces if each.target <= unit.begin < max(each.target + each.size, 1))
        return piece.file.mapped(piece.begin + unit.begin - piece.target, unit.size, unit.name)


@dataclass
class _Load:
    """A block on its way into a slot."""

    block: int
    tickets: list[Any]
    parts: list[Future[Any]]

    def failed(self) -> bool:
        """Return True if a read of the block is known to have failed."""
        return any(part.done() and part.exception() is not None for part in self.parts)

    def arrived(self, link: Link) -> None:
        """Make the device wait for the block. Raises the error of a read that failed."""
        for part in self.parts:
            self.tickets.append(part.result())
        self.parts.clear()
        for ticket in self.tickets:
            link.wait(ticket)
        self.tickets.clear()


class Streamer:
    """Fetches blocks into the slots of a ring.

    Attributes:
        link: the way to the device.
        stored: the streamed blocks, in the order in which they run.
        slots: the buffers on the device.
        waited: seconds that the host has waited for blocks.
    """

    def __init__(self, link: Link, stored: Sequence[Stored], ahead: int, reader: Reader | None) -> None:
        self.link, self.stored, self.reader = link, list(stored), reader
        count = min(ahead + 1, len(self.stored))
        self.slot_of = _slots(len(self.stored), count)
        sizes = [0] * count
        for block, slot in enumerate(self.slot_of):
            sizes[slot] = max(sizes[slot], self.stored[block].size)
        self.slots = [link.slot(size) for size in sizes]
        self._loads: list[_Load | None] = [None] * count
        self._free: list[Any] = [link.mark() for _ in range(count)]
        self._next = [(block + 1) % max(1, len(self.stored)) for block in range(len(self.stored))]
        self._last: int | None = None
        self._lock = threading.RLock()
        self.waited = 0.0
        self.fetched = 0

    def memory_of(self, block: int) -> Tensor:
        """Return the slot of a block, as much of it as the block takes."""
        return self.slots[self.slot_of[block]][: self.stored[block].size]

    def enter(self, block: int) -> None:
        """Have a block in its slot when the device goes on, and begin to fetch those after it.

        Raises ``CheckpointError``, with file and tensor, if it could not be read.
        """
        self._lock.acquire()  # until ``leave``: another thread must not fetch into a slot that is being read
        try:
            if self._last is not None and self._last != block:
                self._next[self._last] = block
            self._last = block
            load = self._loads[self.slot_of[block]]
            if load is None or load.block != block or load.failed():  # what failed ahead of time is tried again
                load = self._fetch(block)
            self._fetch_ahead(block)
            started = time.perf_counter()
            load.arrived(self.link)
            self.waited += time.perf_counter() - started
        except BaseException:
            self._drop(self.slot_of[block])  # not there: the next call reads it again
            self._lock.release()
            raise

    def leave(self, block: int) -> None:
        """Let the slot of a block be overwritten once the device has done what it was given so far."""
        self._free[self.slot_of[block]] = self.link.mark()
        self._lock.release()

    def _fetch_ahead(self, block: int) -> None:
        taken, after = {self.slot_of[block]}, block
        for _ in range(len(self.slots) - 1):
            after = self._next[after]
            slot = self.slot_of[after]
            if slot in taken:
                return
            taken.add(slot)
            load = self._loads[slot]
            if load is None or load.block != after:
                self._fetch(after)

    def _fetch(self, block: int) -> _Load:
        slot, stored = self.slot_of[block], self.stored[block]
        self._drop(slot)
        memory, free = self.memory_of(block), self._free[slot]
        if stored.memory is not None:
            load = _Load(block, [self.link.copy(memory, stored.memory, free)], [])
        else:
            assert self.reader is not None
            load = _Load(block, [], self.reader.read(stored.pieces, memory, free))
        self._loads[slot] = load
        self.fetched += stored.size
        return load

    def forget(self) -> None:
        """Wait for what is under way, and take every slot for empty."""
        for slot in range(len(self._loads)):
            self._drop(slot)

    def _drop(self, slot: int) -> None:
        """Take a slot for empty. A wrong guess may still be on its way there, and nothing else may write to it."""
        load, self._loads[slot] = self._loads[slot], None
        for part in load.parts if load is not None else ():
            part.exception()


def _slots(blocks: int, count: int) -> list[int]:
    """Return the slot of each block. The last block does not have that of the first, which follows it, if it can."""
    found = [block % count for block in range(blocks)]
    if count > 2 and blocks % count == 1 and blocks > count:
        found[-1] = 1
    return found
