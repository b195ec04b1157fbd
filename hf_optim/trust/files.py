"""Files of a checkpoint: regular files inside its folder, and nothing that a name in a file leads to elsewhere.

The names in an index or a configuration are input: the author of the checkpoint chose them. A snapshot in the cache of
the Hub consists of symbolic links to the blobs of the same repository; these links are allowed, and no others that
leave the folder.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path, PurePosixPath

from ..errors import CheckpointError
from .bounds import shown

# Files that transformers and hf_optim read from a checkpoint, by suffix.
READ_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".safetensors", ".tiktoken")
MAX_ENTRIES = 100_000  # of a folder


def require_inside(home: Path, name: str) -> Path:
    """Return the path of the regular file ``name`` of the checkpoint in ``home``. Nothing is opened.

    Raises ``CheckpointError`` if ``name`` is not a plain relative name, or if it is missing, a directory, a device, a
    pipe or a socket, or a symbolic link out of the folder.
    """
    path = home / plain_name(home, name)
    try:
        kind = path.stat().st_mode
    except FileNotFoundError as error:
        raise CheckpointError(f"{home} has no file {name!r}: download or copy it again") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r} of {home} cannot be read: {_reason(error)}") from error
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{name!r} of {home} is {_kind_of(kind)}, not a regular file")
    _require_link_inside(home, path, name)
    if path.name not in os.listdir(path.parent):  # file systems that ignore case find it nevertheless
        raise CheckpointError(f"{home} has no file {name!r}: the case of its name differs")
    return path


def require_regular(home: Path) -> None:
    """Raise ``CheckpointError`` unless the files in ``home`` that a reader may open are regular files inside it.

    Those are configurations, tokenizers, templates and weights at the top of the folder. Opening a pipe would wait for
    ever, and a link could copy a private file into what is written and published.
    """
    for name in _names(home):
        if name.endswith(READ_SUFFIXES):
            path = home / name
            try:
                kind = path.stat().st_mode
            except OSError:
                continue  # a dangling link: a reader reports that the file is missing
            if stat.S_ISDIR(kind) and not name.endswith(".safetensors"):
                continue
            if not stat.S_ISREG(kind):
                raise CheckpointError(f"{name!r} of {home} is {_kind_of(kind)}, not a regular file")
            _require_link_inside(home, path, name)


def require_publishable(home: Path) -> None:
    """Raise ``CheckpointError`` if a file or folder below ``home`` is a link out of it, or not a regular file.

    An upload follows links, and would publish what they lead to.
    """
    for folder, folders, names in os.walk(home):
        for name in (*folders, *names):
            path = Path(folder, name)
            relative = str(path.relative_to(home))
            try:
                kind = path.stat().st_mode
            except OSError as error:
                raise CheckpointError(f"{relative!r} of {home} cannot be read: {_reason(error)}") from error
            if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
                raise CheckpointError(f"{relative!r} of {home} is {_kind_of(kind)}, not a regular file")
            _require_link_inside(home, path, relative)


def plain_name(home: object, name: object) -> str:
    """Return ``name`` if it is a relative path without ``..``. Raises ``CheckpointError``; ``home`` is for messages."""
    if not isinstance(name, str) or not name or "\0" in name or "\\" in name or len(name) > 1000:
        raise CheckpointError(f"{shown(name)} is not the name of a file of {home}")
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or Path(name).is_absolute():
        raise CheckpointError(
            f"{shown(name)} is outside {home}: a checkpoint may name only files inside its own folder"
        )
    return name


def _require_link_inside(home: Path, path: Path, name: str) -> None:
    """Raise ``CheckpointError`` if a link on the way from ``home`` to ``path`` leads out of the folder."""
    real = Path(os.path.realpath(path))
    allowed = [Path(os.path.realpath(home)), *_blobs_of(home)]
    if not any(real.is_relative_to(folder) for folder in allowed):
        raise CheckpointError(
            f"{name!r} of {home} is a link to {real}, outside the checkpoint: put the file itself into the folder"
        )


def _blobs_of(home: Path) -> list[Path]:
    """Return the folder of the blobs that a snapshot of the Hub's cache links to; empty for any other folder."""
    real = Path(os.path.realpath(home))
    for folder in (real, *real.parents):
        if folder.parent.name == "snapshots":
            return [folder.parent.parent / "blobs"]
    return []


def _names(home: Path) -> list[str]:
    try:
        names = sorted(os.listdir(home))
    except OSError as error:
        raise CheckpointError(f"{home} cannot be read: {_reason(error)}") from error
    if len(names) > MAX_ENTRIES:
        raise CheckpointError(f"{home} has {len(names)} files: it is not the folder of a checkpoint")
    return names


def _kind_of(mode: int) -> str:
    kinds = (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISSOCK, "a socket"),
    )
    return next((kind for matches, kind in kinds if matches(mode)), "a special file")


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
