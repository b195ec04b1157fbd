"""Files of a work folder with checksums, so that a resumed run reads only what it wrote, whole and unchanged.

Beside each file stands ``FILE.sum`` with a SHA-256 over the identity of the run, the name of the file and its content.
It is written last and marks the file as complete. A flipped bit, a truncated file, a file under another file's name and
a file of another run do not match it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..trust.documents import read_mapping
from .disk_errors import readable_disk_errors

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 22
SUFFIX = ".sum"
WRITING = ".writing"  # ends the name of a file that is not complete


def digest_json(content: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a mapping of JSON types."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()


def digest_file(path: Path, *before: str) -> str:
    """Return the SHA-256 of the texts ``before`` and the content of a file."""
    digest = hashlib.sha256("".join(f"{len(text)} {text}" for text in before).encode())
    buffer = bytearray(CHUNK_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def seal(path: Path, identity: str) -> None:
    """Write the checksum of a complete file. ``identity`` is the ``digest_json`` of what its content depends on."""
    write_atomically(_sum(path), digest_file(path, identity, path.name))


def unseal(path: Path) -> None:
    """Mark a file as incomplete, before it is written again; a folder in its place is removed."""
    with readable_disk_errors(path.parent, path.name):
        for each in (path, _sum(path)):
            if each.is_dir() and not each.is_symlink():
                shutil.rmtree(each)
        _sum(path).unlink(missing_ok=True)


def is_intact(path: Path, identity: str) -> bool:
    """Return True if a file is complete and as it was written. A damaged one is logged; a missing one is not."""
    if not os.path.lexists(path) and not os.path.lexists(_sum(path)):
        return False
    try:
        if is_regular(path) and is_regular(_sum(path)):
            with _sum(path).open("rb") as file:
                if file.read(100) == digest_file(path, identity, path.name).encode():
                    return True
    except OSError as error:
        log.debug("%s: %s", path, error)
    if not os.path.lexists(_sum(path)):
        log.info("%s is incomplete: its part is computed again", path)
        return False
    log.warning("%s is damaged, missing or of another run: it is not used, and its part is computed again", path)
    return False


def is_regular(path: Path) -> bool:
    """Return True for a regular file that is not a link."""
    try:
        return stat.S_ISREG(path.lstat().st_mode)
    except OSError:
        return False


def write_atomically(path: Path, text: str) -> None:
    """Write a text file that is moved into place once it is complete. Raises ``CheckpointError``."""
    beside = path.with_name(path.name + WRITING)
    with readable_disk_errors(path.parent, path.name, len(text)):
        try:
            beside.write_text(text, encoding="utf-8")
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise


def read_json(path: Path, remedy: str) -> dict[str, Any]:
    """Read a JSON object. Raises ``CheckpointError`` if it is not one, ending with ``remedy``."""
    try:
        return read_mapping(path, path.name, nonfinite=True)
    except CheckpointError as error:
        raise CheckpointError(f"{path} cannot be read ({error}); {remedy}") from error


def _sum(path: Path) -> Path:
    return path.with_name(path.name + SUFFIX)
