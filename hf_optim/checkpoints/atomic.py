"""Writing a directory so that it is, at every moment, either the old one or the new one, whole."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replace_directory(directory: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty directory beside ``directory``; when the body succeeds, it takes the other's place at once.

    Files of the old directory that the body did not write are carried over (as hard links), except those whose name
    is ``stale``. When the body raises, or the process is killed at any point, the old directory stays as it was; what
    a killed process left beside it is removed by the next call. Raises ``CheckpointError`` when the disk is full.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _recover(directory)
    beside = directory.with_name(f".{directory.name}.saving-{os.getpid()}")
    beside.mkdir()
    try:
        yield beside
        _carry_over(directory, beside, stale)
        _sync(beside)
        _exchange(directory, beside)
    except (OSError, SafetensorError) as error:
        if _os_error(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(
                f"the disk is full: {directory} was not written, and what was there before is untouched"
            ) from error
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _os_error(error: Exception) -> int | None:
    """The number of the system's error; safetensors tells it in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _carry_over(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    for path in sorted(old.rglob("*")) if old.is_dir() else ():
        target = new / path.relative_to(old)
        if path.is_dir():
            target.mkdir(exist_ok=True)
        elif not target.exists() and not (path.parent == old and stale(path.name)):
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, target, follow_symlinks=False)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def _exchange(directory: Path, beside: Path) -> None:
    if not directory.exists():
        os.rename(beside, directory)
    elif not _swap(directory, beside):
        # No atomic exchange on this system: for a moment the name is free, and _recover mends a kill in that moment.
        old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
        os.rename(directory, old)
        os.rename(beside, directory)
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one system call (Linux renameat2). False where that is not to be had."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _recover(directory: Path) -> None:
    for old in directory.parent.glob(f".{directory.name}.old-*"):
        if not directory.exists():
            os.rename(old, directory)
        elif not _alive(old):
            shutil.rmtree(old, ignore_errors=True)
    for left in directory.parent.glob(f".{directory.name}.saving-*"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)


def _alive(path: Path) -> bool:
    """Whether the process that made ``path`` (its id ends the name) is another one that still runs."""
    process = int(path.name.rsplit("-", 1)[1])
    if process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
