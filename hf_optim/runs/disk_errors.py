"""Translate errors of writing into ones that name the folder, the cause, and how much room there is."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, OptimError
from ..trust.figures import format_bytes

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def readable_disk_errors(folder: str | Path, what: str, needed: int | None = None, remedy: str = "") -> Iterator[None]:
    """Raise ``CheckpointError`` in place of the errors of writing to a folder in the body.

    Args:
        folder: where the body writes; the message tells how much is free there.
        what: what the body writes: "the block model.layers.0".
        needed: its bytes, if known.
        remedy: ends the message: what is unchanged, and what to do.
    """
    try:
        yield
    except OptimError:
        raise
    except (OSError, SafetensorError, RuntimeError) as error:
        number = errno_of(error)
        if isinstance(error, RuntimeError) and not _is_of_writing(error):
            raise
        ending = f"; {remedy}" if remedy else ""
        if number in FULL or isinstance(error, RuntimeError):
            cause = "the disk is full" if number != errno.EFBIG else "the disk is full, or files may not be that large"
            raise CheckpointError(
                f"{cause}: {what} was not written to {folder} ({_room(Path(folder), needed)}){ending}"
            ) from error
        reason = os.strerror(number) if number is not None else " ".join(str(error).split())
        raise CheckpointError(f"{what} was not written to {folder}: {reason}{ending}") from error


def errno_of(error: BaseException) -> int | None:
    """Return the errno of an error; safetensors has it only in its message."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))
    return int(found[1]) if found else None


def _is_of_writing(error: RuntimeError) -> bool:
    # torch.save reports a failed write without an errno.
    return any(words in str(error) for words in ("PytorchStreamWriter", "file write failed", "unexpected pos"))


def _room(folder: Path, needed: int | None) -> str:
    home = next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), Path(os.sep))
    try:
        free = f"{format_bytes(shutil.disk_usage(home).free)} free"
    except OSError:
        free = "free space unknown"
    return free if needed is None else f"{format_bytes(needed)} needed, {free}"
