"""The header of a work folder: what its content was made from, so that no other run resumes from it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from . import work_files
from .disk_errors import readable_disk_errors

log = logging.getLogger(__name__)

HEADER = "journal.json"
# The names of what a work folder holds. A folder with anything else and without a header is not a work folder.
_NAMES = re.compile(
    r"(journal\.json|training-\d+|(step|state|model)-[^/]*\.safetensors(\.sum)?|progress\.json)(\.writing)?"
)


def is_begun(header: Path, mine: Mapping[str, Any], what: str) -> bool:
    """Return True if there is a header. Raises ``CheckpointError`` if it cannot be read or differs from ``mine``.

    ``what`` begins the message: "the journal in out was made with".
    """
    if not header.is_file():
        return False
    theirs = work_files.read_json(header, "start without --resume")
    if theirs.get("format") != mine.get("format"):
        raise CheckpointError(
            f"cannot resume: {what} another format ({str(theirs.get('format'))[:20]}; this version of hf_optim has "
            f"{mine.get('format')}); start without --resume"
        )
    differing = sorted(key for key in mine if mine[key] != theirs.get(key))
    if differing:
        raise CheckpointError(f"cannot resume: {what} another {', '.join(differing)}; start without --resume")
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically. Raises ``CheckpointError``."""
    work_files.write_atomically(path, json.dumps(content, indent=2))


def remove_work_folder(folder: Path) -> None:
    """Remove a work folder with its content, if there is one.

    Raises ``CheckpointError`` for a link, for a file, and for a folder that holds something else.
    """
    require_work_folder(folder)
    if folder.is_dir():
        with readable_disk_errors(folder, "the work of an earlier run (to be removed)"):
            shutil.rmtree(folder)


def require_work_folder(folder: Path) -> None:
    """Raise ``CheckpointError`` if a folder exists and is not a work folder: a link, a file, or of other content."""
    if folder.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link, and the work of a run needs its own folder: remove it")
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} is a file, and the work of a run needs that folder: remove it")
    if not folder.is_dir() or (folder / HEADER).is_file():
        return
    for path in folder.iterdir():
        if not _NAMES.fullmatch(path.name):
            raise CheckpointError(
                f"{folder} holds {path.name}, which is not the work of a run: move it away, or choose another folder"
            )
