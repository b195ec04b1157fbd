"""Reading ranges of files past the page cache, into host memory or on to the device, by several threads.

A range is read with ``O_DIRECT`` where the file system takes it, in whole sectors into a buffer of the thread;
elsewhere it is read as usual and its pages are dropped right after. So the cache of the kernel does not grow with the
model, and a budget of host memory holds. Each buffer is copied to where it belongs while the next one is read.

Every read is checked: for its length, for a change of the file since it was opened, and against the sum of the words
that the first read of the same range gave.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelError

SECTOR = 4096
CHUNK = 8 << 20
THREADS = 4
# Memory of this process alone; what Python maps otherwise is shared, and counts as page cache.
PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")

# Copies a buffer that was read to its target after a mark of the device. Returns what to wait for before it is used.
Put = Callable[[Tensor, Tensor, Any], Any]


class OpenFile:
    """A file that ranges are read from; it stays open, so a file that was replaced is still the former one.

    Attributes:
        name: for messages.
        direct: its reads bypass the page cache.
    """

    def __init__(self, path: str | Path, name: str) -> None:
        self.path, self.name = str(path), name
        self.plain = self.direct_fd = -1
        try:
            self.plain = os.open(path, os.O_RDONLY)
            self.state = self._state()
        except OSError as error:
            raise CheckpointError(f"{name} cannot be read: {error.strerror}") from error
        try:
            self.direct_fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
            if not hasattr(os, "O_DIRECT"):
                raise OSError
            with mmap.mmap(-1, SECTOR) as probe:
                os.preadv(self.direct_fd, [probe], 0)
        except OSError:
            self._close(self.direct_fd)
            self.direct_fd = -1

    @property
    def direct(self) -> bool:
        return self.direct_fd >= 0

    def _state(self) -> tuple[int, int]:
        found = os.fstat(self.plain)
        return found.st_size, found.st_mtime_ns

    def require_unchanged(self, tensor: str) -> None:
        """Raise ``CheckpointError`` if the file has another size or time of change than when it was opened."""
        size, changed = self._state()
        if size < self.state[0]:
            raise CheckpointError(
                f"{self.name} was truncated from {self.state[0]} to {size} bytes while {tensor} was needed from it"
            )
        if (size, changed) != self.state:
            raise CheckpointError(f"{self.name} has changed since the model was offloaded; {tensor} was needed from it")

    def read(self, begin: int, buffer: memoryview, tensor: str) -> int:
        """Read from ``begin`` into a buffer, until it is full or the file ends; return the bytes read."""
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self.direct_fd if self.direct else self.plain, [buffer[done:]], begin + done)
            except OSError as error:
                raise CheckpointError(f"{self.name}: reading {tensor} failed: {error.strerror}") from error
            done += got
            if not got or done % SECTOR:  # the end of the file
                break
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.plain, begin, done, os.POSIX_FADV_DONTNEED)
        return done

    def mapped(self, begin: int, size: int, tensor: str) -> Tensor:
        """Return the range of a tensor over mapped memory, uint8: nothing is read before it is used."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        self.require_unchanged(tensor)
        first = begin // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(self.plain, begin + size - first, access=mmap.ACCESS_COPY, offset=first)
        return torch.frombuffer(pages, dtype=torch.uint8, offset=begin - first, count=size)

    @staticmethod
    def _close(fd: int) -> None:
        if fd >= 0:
            os.close(fd)

    def __del__(self) -> None:
        self._close(getattr(self, "plain", -1))
        self._close(getattr(self, "direct_fd", -1))


@dataclass(frozen=True)
class Piece:
    """A range of a file, and where it belongs in the buffer of a block.

    Attributes:
        file: the file.
        begin: the first byte there.
        size: bytes.
        target: the first byte in the buffer.
        name: the tensor, for messages.
    """

    file: OpenFile
    begin: int
    size: int
    target: int
    name: str


class SpillFile:
    """A file without a name that holds blocks; it is gone with the process, however that ends.

    Raises ``ModelError`` for a folder in memory, which would save none, and one that cannot be written to.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = Path(folder or tempfile.gettempdir())
        if (kind := file_system(self.folder)) in MEMORY_FILE_SYSTEMS:
            raise ModelError(f"{self.folder} is a {kind}, which is memory, not a disk: pass folder= on a disk")
        try:
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                self.fd = os.dup(file.fileno())
        except OSError as error:
            raise ModelError(f"weights cannot be written to {self.folder}: {error.strerror}") from error
        self.end = 0

    def append(self, memory: Tensor) -> int:
        """Write the bytes of a CPU tensor to the disk, and return where they begin."""
        begin, view, done = self.end, _bytes_of(memory), 0
        try:
            while done < len(view):
                done += os.pwrite(self.fd, view[done : done + CHUNK], begin + done)
            os.fdatasync(self.fd)
        except OSError as error:
            raise ModelError(
                f"writing {len(view)} bytes of weights to {self.folder} failed: {error.strerror}; pass folder= on a "
                "disk with more room"
            ) from error
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, begin, done, os.POSIX_FADV_DONTNEED)
        self.end = -(-(begin + done) // SECTOR) * SECTOR
        return begin

    def finished(self) -> OpenFile:
        """Return the file for reading, once everything is written."""
        os.ftruncate(self.fd, self.end)
        return OpenFile(f"/proc/self/fd/{self.fd}", f"the offloaded weights in {self.folder}")

    def __del__(self) -> None:
        OpenFile._close(getattr(self, "fd", -1))


def drop_pages(path: str | Path) -> None:
    """Have the kernel forget the pages of a file that was read, where it can."""
    if hasattr(os, "posix_fadvise"):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def file_system(folder: Path) -> str:
    """Return the type of the file system of a folder, as Linux names it; empty if unknown."""
    try:
        mounts = [line.split(" ") for line in Path("/proc/self/mounts").read_text("utf-8").splitlines()]
        home = folder.resolve()
    except OSError:
        return ""
    found = [(len(fields[1]), fields[2]) for fields in mounts if home.is_relative_to(fields[1])]
    return max(found, default=(0, ""))[1]


class Reader:
    """Threads that read pieces into the memory of a block.

    Args:
        allocate: makes a buffer of a thread: uint8 in host memory, its address a multiple of ``SECTOR``.
        put: see ``Put``.
        finish: waits until what ``put`` returned has left the buffer.
        threads: how many.
    """

    def __init__(
        self, allocate: Callable[[int], Tensor], put: Put, finish: Callable[[Any], None], threads: int = THREADS
    ) -> None:
        self.put, self.finish, self.allocate, self.threads = put, finish, allocate, threads
        self._own = threading.local()
        self._pool: ThreadPoolExecutor | None = None
        self._sums: dict[tuple[int, int], int] = {}
        self.bytes_read, self.busy = 0, 0.0

    @staticmethod
    def memory(threads: int = THREADS) -> int:
        """Return the bytes of the buffers."""
        return 2 * threads * (CHUNK + SECTOR)

    def read(self, pieces: Iterable[Piece], target: Tensor, after: Any = None) -> list[Future[Any]]:
        """Begin to read pieces into the memory of a block, which may be overwritten ``after`` a mark of the device.

        Each result is what ``put`` returned for a part.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, "offload")
        parts = []
        for piece in pieces:
            for at in range(0, piece.size, CHUNK):
                size = min(CHUNK, piece.size - at)
                own = target[piece.target + at : piece.target + at + size]
                parts.append(self._pool.submit(self._part, piece.file, piece.begin + at, own, piece.name, after))
        return parts

    def _part(self, file: OpenFile, begin: int, target: Tensor, name: str, after: Any) -> Any:
        file.require_unchanged(name)
        memory = self._buffer()
        first = begin // SECTOR * SECTOR
        wanted = begin + len(target) - first
        whole = -(-wanted // SECTOR) * SECTOR
        started = time.perf_counter()
        got = file.read(first, _bytes_of(memory)[:whole], name)
        self.busy += time.perf_counter() - started
        if got < wanted:
            raise CheckpointError(f"{file.name} is truncated: it ends {wanted - got} bytes inside {name}")
        words = memory[begin - first : begin - first + len(target) // 8 * 8]
        self._check((id(file), begin), _sum(words), file, name)
        self.bytes_read += len(target)
        ticket = self.put(target, memory[begin - first : wanted], after)
        self._own.tickets[self._own.turn] = ticket
        return ticket

    def _check(self, key: tuple[int, int], found: int, file: OpenFile, name: str) -> None:
        if self._sums.setdefault(key, found) != found:
            raise CheckpointError(f"{file.name}: {name} differs from what was read of it before: the disk is failing")

    def _buffer(self) -> Tensor:
        own = self._own
        if not hasattr(own, "buffers"):
            own.buffers, own.tickets, own.turn = [self.allocate(CHUNK + SECTOR) for _ in range(2)], [None, None], 0
        own.turn ^= 1
        self.finish(own.tickets[own.turn])
        return own.buffers[own.turn]


def _sum(memory: Tensor) -> int:
    if not len(memory):
        return 0
    for dtype in (torch.int64, torch.int32, torch.int16):
        if memory.storage_offset() % dtype.itemsize == 0:
            return int(memory.view(dtype).sum(dtype=torch.int64))
    return int(memory.sum(dtype=torch.int64))


def _bytes_of(memory: Tensor) -> memoryview:
    return memoryview(memory.numpy())  # type: ignore[arg-type]  # numpy's stubs on 3.10


def aligned_memory(size: int) -> Tensor:
    """Return host memory that begins at a page, uint8."""
    return torch.frombuffer(mmap.mmap(-1, max(size, 1), flags=PRIVATE), dtype=torch.uint8)[:size]
