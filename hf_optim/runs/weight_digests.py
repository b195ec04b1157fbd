"""Digests of a checkpoint's weight files: they tell whether a record, and what was measured, is that of the weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError
from .work_files import digest_file


def weight_digests(directory: str | Path) -> dict[str, str]:
    """Return the SHA-256 of each safetensors file at the top of a checkpoint, by name. Reads all of them.

    Raises ``CheckpointError`` if one cannot be read.
    """
    return {path.name: _digest(path) for path in sorted(Path(directory).glob("*.safetensors"))}


def _digest(path: Path) -> str:
    try:
        return digest_file(path)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error


def changed_weights(directory: str | Path, stated: Mapping[str, str]) -> list[str]:
    """Return the names of weight files that are not those a record states, were added or are gone; sorted."""
    now = weight_digests(directory)
    return sorted(name for name in {*now, *stated} if now.get(name) != stated.get(name))


def weight_stamps(directory: str | Path) -> dict[str, tuple[int, int, int]]:
    """Return inode, bytes and time of change of each weight file: cheap to compare after a while of work."""
    stats = {path.name: path.stat() for path in Path(directory).glob("*.safetensors")}
    return {name: (stat.st_ino, stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
