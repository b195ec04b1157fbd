"""Locks of folders: one process writes a folder, and a lock ends with its process, even with a killed one.

The lock is a record lock of the operating system on ``.NAME.lock`` beside the folder. On a file system without such
locks the file itself is the lock: it names process and host, and it is taken over once that process has ended on this
host. There, two processes that start within the same tenth of a second may both pass.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..trust.bounds import first_line, shown

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BUSY = (errno.EACCES, errno.EAGAIN, errno.EDEADLK)
MAX_NAME, MAX_PATH = 200, 4000  # bytes; files beside the folder have its name and a suffix
SETTLE = 0.1  # seconds between writing a claim and reading it back, where there are no locks


@dataclass
class _Held:
    descriptor: int
    process: int
    thread: int
    made: tuple[Path, ...]
    count: int = 1


class _Busy(Exception):
    pass


_held: dict[Path, _Held] = {}
_guard = threading.Lock()


@contextlib.contextmanager
def locked(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Hold the lock of a folder in the body; yield the folder's real path. The folder itself need not exist.

    Missing parents are created, and removed afterwards if they are still empty. A thread may lock a folder again that
    it has locked already. Raises ``CheckpointError`` if another process or thread holds the lock (the message names
    process and host), or if the parent cannot be written.
    """
    real = acquire(folder)
    try:
        yield real
    finally:
        release(real)


def acquire(folder: str | os.PathLike[str]) -> Path:
    """Lock a folder until ``release``, and return its real path. See ``locked``."""
    real = real_path(folder)
    with _guard:
        held = _held.get(real)
        if held is not None and held.process == os.getpid():
            if held.thread != threading.get_ident():
                raise CheckpointError(
                    f"{real} is being written by another thread of this process: wait for it to end, or choose "
                    "another directory"
                )
            held.count += 1
            return real
        made = _make_parents(real)
        try:
            descriptor = _open_locked(_lock_file(real), real)
        except BaseException:
            _remove_empty(made)
            raise
        _held[real] = _Held(descriptor, os.getpid(), threading.get_ident(), made)
    return real


def release(real: Path) -> None:
    """Undo one ``acquire``, which returned ``real``; the last one removes the lock file."""
    with _guard:
        held = _held.get(real)
        if held is None or held.process != os.getpid():
            return
        held.count -= 1
        if held.count:
            return
        del _held[real]
        # Removed while it is still locked: a process that opened it before finds another file, or none, under its name.
        with contextlib.suppress(OSError):
            _lock_file(real).unlink()
        os.close(held.descriptor)
        with contextlib.suppress(OSError):  # an open file cannot be removed on Windows
            if fcntl is None:
                _lock_file(real).unlink()
        _remove_empty(held.made)


def is_held(folder: Path) -> bool:
    """Return True if this process holds the lock of a folder."""
    with _guard:
        held = _held.get(real_path(folder))
        return held is not None and held.process == os.getpid()


def real_path(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder without links. Raises ``CheckpointError`` if it cannot name a folder."""
    try:
        real = Path(os.path.realpath(folder))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{shown(str(folder))} cannot be the name of a directory: {first_line(error)}") from error
    if os.path.islink(real):
        raise CheckpointError(
            f"{folder} is a symbolic link that leads to itself: remove it, or choose another directory"
        )
    if not real.name:
        raise CheckpointError(f"{real} is the root of a file system: name a directory in it")
    if len(os.fsencode(str(real))) > MAX_PATH or len(os.fsencode(real.name)) > MAX_NAME:
        raise CheckpointError(f"{shown(str(folder))} is too long for a directory: choose a shorter name")
    if not real.name.isprintable():
        raise CheckpointError(f"{shown(str(folder))} has control characters in its name: choose another directory")
    return real


def _lock_file(real: Path) -> Path:
    return real.with_name(f".{real.name}.lock")


def _make_parents(real: Path) -> tuple[Path, ...]:
    """Create the missing parents of a folder. Returns those created, the innermost first."""
    made = tuple(parent for parent in real.parents if not os.path.lexists(parent))
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        _remove_empty(made)
        raise CheckpointError(f"cannot write to {real}: {getattr(error, 'strerror', None) or error}") from error
    return made


def _remove_empty(folders: tuple[Path, ...]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _open_locked(path: Path, folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o666)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot write to {folder}: {getattr(error, 'strerror', error)} ({path})") from error
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise CheckpointError(f"cannot write to {folder}: {path} is not a regular file; remove it")
            _lock(descriptor)
            if not _is_file(descriptor, path):  # its former holder has removed it in between
                os.close(descriptor)
                continue
            _write_holder(descriptor)
            return descriptor
        except _Busy:
            holder = _holder(descriptor, wait=True)
            os.close(descriptor)
            raise CheckpointError(
                f"{folder} is being written by {_describe(holder)}: wait for it to end, or choose another directory"
            ) from None
        except BaseException:
            with contextlib.suppress(OSError):
                os.close(descriptor)
            raise


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise ``_Busy``."""
    try:
        if fcntl is not None:
            # Not inherited by forked workers, which may outlive a killed process for a while.
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            import msvcrt

            os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # the text before it stays readable to others
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    except OSError as error:
        if error.errno in BUSY:
            raise _Busy from error
        _claim(descriptor)


def _claim(descriptor: int) -> None:
    """Lock a file on a file system without locks: by its content."""
    holder = _holder(descriptor)
    if holder and not (holder.get("host") == socket.gethostname() and not _is_alive(holder.get("process"))):
        raise _Busy
    _write_holder(descriptor)
    time.sleep(SETTLE)
    if _holder(descriptor).get("process") != os.getpid():
        raise _Busy


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {"process": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    with contextlib.suppress(OSError):  # only the message of others is poorer on a full disk
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, json.dumps(holder).encode())


def _holder(descriptor: int, wait: bool = False) -> dict[str, Any]:
    for _ in range(20 if wait else 1):
        with contextlib.suppress(OSError, ValueError):
            os.lseek(descriptor, 0, os.SEEK_SET)
            found = json.loads(os.read(descriptor, 1000))
            if isinstance(found, dict):
                return found
        if wait:
            time.sleep(0.01)  # it is locked first and written then
    return {}


def _describe(holder: dict[str, Any]) -> str:
    if not holder:
        return "another process"
    process, host, since = (str(holder.get(key))[:80] for key in ("process", "host", "since"))
    return f"process {process} on {host} (since {since})"


def _is_alive(process: Any) -> bool:
    if not isinstance(process, int) or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
