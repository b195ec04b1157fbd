"""Ranks that notice when another one has ended: beats in the store of the process group.

A killed rank leaves the others waiting. gloo's connections break, with an error that names no rank; NCCL's kernels wait
on the device for ever, and its own watchdog ends them after ten minutes. So each rank writes a count to the store once
a second, in a thread, and reads those of the others. A rank whose count stands still for longer than the limit has
ended (or was stopped); the one that stands still longest is named, since others may have ended for its sake.

A rank that computes in vain is not noticed here: its thread goes on. The limit of the process group is for that one.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from ...errors import RankError
from . import collectives

LIMIT = 30.0
"""Seconds without a beat after which a rank has ended."""
EXIT_STATUS = 75
LEFT = b"left"
KEEPER = 0
"""The rank whose process keeps the store, unless the launcher does."""
T = TypeVar("T")
_watch: Watch | None = None


class Watch:
    """The beats of this rank and of the others.

    Args:
        store: of the process group, for this thread alone.
        rank, ranks: the number of this rank, and how many there are.
        limit: seconds without a beat after which a rank has ended.

    When another rank has ended, ``guarded`` raises. A main thread that hangs in a collective, as with NCCL or a host
    that is gone, raises nothing: then the process is ended a moment later, with the message on standard error.
    """

    def __init__(self, store: Any, rank: int, ranks: int, limit: float) -> None:
        self.store, self.rank, self.ranks, self.limit = store, rank, ranks, limit
        self.raised = False
        self.step = min(1.0, limit / 5)
        self.silent: int | None = None
        self.seconds = 0.0
        self._count = 0
        self._leaving = threading.Event()
        now = time.monotonic()
        self._seen: dict[int, tuple[bytes, float]] = {other: (b"", now) for other in range(ranks) if other != rank}
        self._thread = threading.Thread(target=self._run, name="hf_optim ranks", daemon=True)

    def start(self) -> None:
        """Write the first beat and start the thread."""
        self._beat()
        self._thread.start()

    def leave(self) -> None:
        """Stop, and tell the others that this rank ends in order."""
        if self._leaving.is_set():
            return
        self._leaving.set()
        self._thread.join(self.step * 2)
        try:
            self.store.set(str(self.rank), LEFT.decode())
            if self.rank == KEEPER:
                self._let_others_look()
        except Exception:  # the rank that keeps the store may have left before
            return

    def _let_others_look(self) -> None:
        """Keep the store until the others, which may go on alone, have seen that this rank ends in order."""
        end = time.monotonic() + 2 * self.step
        while time.monotonic() < end:
            if all(bytes(self.store.get(str(other))) == LEFT for other in self._seen):
                return
            time.sleep(self.step / 8)

    def message(self) -> str:
        """Return which rank has ended, and what to do."""
        return (
            f"rank {self.silent} of {self.ranks} has ended: it gave no sign for {self.seconds:.0f} s (limit "
            f"{self.limit:.0f} s). Rank {self.rank} ends, too, since its collectives cannot complete: look at the "
            f"output of rank {self.silent} for the cause (out of memory, killed), and start all ranks again"
        )

    def _beat(self) -> None:
        self._count += 1
        self.store.set(str(self.rank), str(self._count))

    def _run(self) -> None:
        while not self._leaving.wait(self.step):
            try:
                self._beat()
                self._look()
            except Exception:
                # The store answers no more: the rank (or the launcher) that keeps it has ended.
                if self.rank != KEEPER and self._seen[KEEPER][0] == LEFT:
                    return  # in order, and no rank can be watched any more
                self._seen = {other: seen for other, seen in self._seen.items() if seen[0] != LEFT}
            self._judge()
            if self.silent is not None:
                if not self._leaving.wait(max(2.0, self.limit / 5)) and not self.raised:
                    print(f"hf_optim: {self.message()}", file=sys.stderr, flush=True)
                    os._exit(EXIT_STATUS)
                return

    def _look(self) -> None:
        now = time.monotonic()
        for other, (last, _) in list(self._seen.items()):
            beat = bytes(self.store.get(str(other))) if self.store.check([str(other)]) else b""
            if beat != last:
                self._seen[other] = beat, now

    def _judge(self) -> None:
        now = time.monotonic()
        waiting = {other: now - at for other, (last, at) in self._seen.items() if last != LEFT}
        if waiting and max(waiting.values()) > self.limit:
            self.silent = max(waiting, key=lambda other: waiting[other])
            self.seconds = waiting[self.silent]

    def await_verdict(self) -> bool:
        """Wait until a rank is known to have ended; False if all of them live."""
        end = time.monotonic() + self.limit + 3 * self.step
        while self.silent is None and time.monotonic() < end:
            time.sleep(self.step / 4)
        self.raised = self.silent is not None
        return self.raised


def watch_ranks(limit: float = LIMIT) -> None:
    """Watch the other ranks of the process group from now on; a second call changes the limit."""
    global _watch
    if collectives.world_size() == 1:
        return
    if _watch is not None:
        _watch.limit = limit
        return
    store: Any = dist.distributed_c10d._get_default_store()
    with contextlib.suppress(AttributeError, RuntimeError, NotImplementedError):
        store = store.clone()  # a thread that waits holds the lock of its client
    _watch = Watch(dist.PrefixStore("hf_optim/beats", store), collectives.rank(), collectives.world_size(), limit)
    _watch.start()
    atexit.register(stop_watching)


def stop_watching() -> None:
    """Stop watching, and tell the others that this rank ends in order."""
    global _watch
    if _watch is not None:
        _watch.leave()
        _watch = None


def guarded(collective: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a collective. If it fails since a rank has ended, raise a ``RankError`` that names the rank."""
    try:
        return collective(*args, **kwargs)
    except RuntimeError as error:
        if _watch is not None and not isinstance(error, RankError) and _watch.await_verdict():
            raise RankError(_watch.message()) from error
        raise
