"""A folder for the activations of one run, inside the directory that several runs may share."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...errors import CheckpointError
from ...runs import folder_lock
from ...runs.disk_errors import readable_disk_errors

PREFIX = "activations-"
_NAME = re.compile(PREFIX + r"[0-9a-z_]{8}")
FILES = ".activations"


@contextmanager
def spill_folder(home: str | os.PathLike[str] | None) -> Iterator[Path | None]:
    """Yield a new folder in ``home``, which is created if it does not exist; both are removed afterwards.

    ``home`` stays if it existed or holds anything else. Folders of killed runs in it are removed first: those that no
    process has locked and that hold nothing but activations. Yields None if ``home`` is None.

    Raises ``CheckpointError`` if ``home`` cannot be written.
    """
    if home is None:
        yield None
        return
    with folder_lock.locked(Path(home) / f"{PREFIX}{secrets.token_hex(4)}") as folder:
        _remove_abandoned(folder.parent)
        with readable_disk_errors(folder.parent, "activations"):
            folder.mkdir()
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _remove_abandoned(home: Path) -> None:
    for path in sorted(home.iterdir()):
        is_folder = path.is_dir() and not path.is_symlink()
        if not is_folder or not _NAME.fullmatch(path.name) or any(part.suffix != FILES for part in path.iterdir()):
            continue
        if folder_lock.is_held(path):
            continue
        with contextlib.suppress(CheckpointError), folder_lock.locked(path):  # refused while its run is alive
            shutil.rmtree(path, ignore_errors=True)
