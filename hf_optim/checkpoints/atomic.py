"""Replace a directory atomically: readers see either the complete old one or the complete new one."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import shutil
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import CheckpointError
from ..runs.disk_errors import readable_disk_errors
from ..runs.folder_lock import locked, real_path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextmanager
def replace_directory(directory: Path, stale: Callable[[str], bool]) -> Iterator[Path]:
    """Yield an empty staging directory; when the body succeeds, it replaces ``directory`` atomically.

    If the body raises, or the process is killed at any point, the old directory is unchanged. The next call removes
    what a killed process left behind. A symbolic link to a directory stays: the directory it points to is replaced.
    The directory is locked meanwhile (``runs.folder_lock``).

    Args:
        directory: the directory to replace, or to create.
        stale: takes the name of a file. Files at the top of the old directory for which it returns True are dropped;
            all other files that the body did not write are carried over, as hard links.

    Raises ``CheckpointError`` if another process writes to ``directory``, if it cannot be replaced (see
    ``require_replaceable``), or if writing fails.
    """
    with locked(directory) as real:
        _recover(real)
        require_replaceable(real)
        staging = _staging(real)
        with readable_disk_errors(real.parent, str(directory), remedy="its former content is untouched"):
            try:
                staging.mkdir()
                yield staging
                use_default_mode(path for path in staging.rglob("*") if path.is_file())
                _carry_over(real, staging, stale)
                _sync(staging)
                _exchange(real, staging)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def use_default_mode(files: Iterable[Path]) -> None:
    """Give files the mode of newly created ones, as the umask of the process defines it.

    The safetensors library creates its files for the owner alone: nobody else could read a shared folder. Links, and
    files that have another name as well, keep their mode.
    """
    for path in files:
        state = path.lstat()
        if stat.S_ISREG(state.st_mode) and state.st_nlink == 1:
            path.chmod(_default_mode(path.parent))


def _default_mode(directory: Path) -> int:
    """Return the mode that a new file in a directory gets. (Reading the umask itself would change it for a moment.)"""
    probe = directory / f".mode-{os.getpid()}"
    with contextlib.suppress(FileNotFoundError):
        probe.unlink()
    descriptor = os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(descriptor).st_mode)
    finally:
        os.close(descriptor)
        probe.unlink()


def require_replaceable(directory: Path) -> None:
    """Raise ``CheckpointError`` if ``directory`` could not be replaced at the end, with the reason and a remedy.

    That is a file, a mount point or a directory with one inside, the current directory of this process or one above it
    (a shell there would be left in a deleted directory), and a parent that cannot be written. Nothing is changed.
    """
    real = real_path(directory)
    if real.exists() and not real.is_dir():
        raise CheckpointError(f"{directory} is a file, not a directory")
    if not real.is_dir():
        _probe(real)
        return
    with contextlib.suppress(FileNotFoundError):  # a process may stand in a deleted directory
        if Path.cwd().is_relative_to(real):
            raise CheckpointError(
                f"{directory} is the current directory, or one above it, and would be replaced under the shell: "
                f"write to a directory inside it ({directory}/NAME), or run the command from elsewhere"
            )
    for mount in _mount_points():
        if mount == real or mount.is_relative_to(real):
            where = "is a mount point" if mount == real else f"holds the mount point {mount}"
            raise CheckpointError(
                f"{directory} {where}, which cannot be replaced atomically: write to a directory inside it "
                f"({directory}/NAME)"
            )
    _probe(real)


def _probe(real: Path) -> None:
    """Try what the end of the work needs: a directory beside ``real``, and the right to rename ``real``."""
    staging = _staging(real)
    _remove(staging)
    try:
        (staging / "content").mkdir(parents=True)
        if real.is_dir():
            # A directory cannot be renamed to one that is not empty. What is refused earlier is refused at the end.
            try:
                os.rename(real, staging)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            else:
                os.rename(staging, real)
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None)
        remedy = f"; write to a directory inside it ({real}/NAME)" if number in (errno.EXDEV, errno.EBUSY) else ""
        reason = os.strerror(number) if number is not None else str(error)
        raise CheckpointError(f"cannot write to {real}: {reason} ({real.parent}){remedy}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _mount_points() -> list[Path]:
    """Return the mount points that this process sees. Linux only; elsewhere the probe finds most of them."""
    found = []
    with contextlib.suppress(OSError, IndexError):
        for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
            name = re.sub(rb"\\([0-7]{3})", lambda octal: bytes([int(octal[1], 8)]), line.split()[4])
            found.append(Path(os.fsdecode(name)))
    return found


def _staging(real: Path) -> Path:
    return real.with_name(f".{real.name}.saving-{os.getpid()}")


def _carry_over(old: Path, new: Path, stale: Callable[[str], bool]) -> None:
    for path in sorted(old.rglob("*")) if old.is_dir() else ():
        target = new / path.relative_to(old)
        if path.is_dir() and not path.is_symlink():
            if not target.exists():
                target.mkdir()
        elif not os.path.lexists(target) and not (path.parent == old and stale(path.name)):
            try:
                os.link(path, target, follow_symlinks=False)
            except OSError:
                shutil.copy2(path, target, follow_symlinks=False)


def _sync(directory: Path) -> None:
    for path in directory.rglob("*"):
        if path.is_file() and not path.is_symlink():
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
        try:
            os.rename(staging, directory)
        except OSError:
            os.rename(old, directory)
            raise
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
    """Restore or remove what killed processes left behind. The directory is locked: no other process is at work."""
    pattern = re.compile(re.escape(f".{directory.name}.") + r"(old|saving)-\d+")
    found = [path for path in directory.parent.iterdir() if pattern.fullmatch(path.name)]
    for old in sorted(path for path in found if ".old-" in path.name[len(directory.name) + 1 :]):
        if not directory.exists():
            os.rename(old, directory)
    for path in found:
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
