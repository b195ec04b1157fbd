"""Replace a directory atomically: readers see either the complete old one or the complete new one."""

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
    """Yield an empty staging directory; when the body succeeds, it replaces ``directory`` atomically.

    If the body raises, or the process is killed at any point, the old directory is unchanged. The next call removes
    what a killed process left behind.

    Args:
        directory: the directory to replace, or to create.
        stale: takes the name of a file. Files at the top of the old directory for which it returns True are dropped;
            all other files that the body did not write are carried over, as hard links.

    Raises ``CheckpointError`` if ``directory`` is a file, or if the disk is full.
    """
    directory = Path(os.path.abspath(directory))
    if directory.exists() and not directory.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    _recover(directory)
    staging = directory.with_name(f".{directory.name}.saving-{os.getpid()}")
    staging.mkdir()
    try:
        yield staging
        _carry_over(directory, staging, stale)
        _sync(staging)
        _exchange(directory, staging)
    except (OSError, SafetensorError) as error:
        if _errno_of(error) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise CheckpointError(
                f"the disk is full: {directory} was not written; its former content is untouched"
            ) from error
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _errno_of(error: Exception) -> int | None:
    """Return the errno of an error; safetensors has it only in its message."""
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


def _exchange(directory: Path, staging: Path) -> None:
    if not directory.exists():
        os.rename(staging, directory)
    elif not _swap(directory, staging):
        # Without an atomic exchange, the name does not exist for a moment; _recover repairs a kill at that point.
        old = directory.with_name(f".{directory.name}.old-{os.getpid()}")
        os.rename(directory, old)
        os.rename(staging, directory)
        shutil.rmtree(old, ignore_errors=True)


def _swap(one: Path, other: Path) -> bool:
    """Exchange two names in one system call (Linux ``renameat2``). Returns False if that is not supported."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    return rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0


def _recover(directory: Path) -> None:
    """Restore or remove what killed processes left behind."""
    for old in directory.parent.glob(f".{directory.name}.old-*"):
        if not directory.exists():
            os.rename(old, directory)
        elif not _is_owner_alive(old):
            shutil.rmtree(old, ignore_errors=True)
    for staging in directory.parent.glob(f".{directory.name}.saving-*"):
        if not _is_owner_alive(staging):
            shutil.rmtree(staging, ignore_errors=True)


def _is_owner_alive(path: Path) -> bool:
    """Return True if ``path`` belongs to another process that is still running; its id ends the name."""
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
