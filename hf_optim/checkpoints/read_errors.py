"""Translate the errors of the safetensors library into those of hf_optim."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from ..errors import CheckpointError
from ..trust.bounds import first_line


@contextmanager
def readable_errors(source: str | os.PathLike[str] | None) -> Iterator[None]:
    """Raise ``CheckpointError`` in place of ``SafetensorError``.

    The headers have been checked before (``trust.weights``), so this is a file that changed meanwhile, or a format that
    the installed library does not read.

    Args:
        source: the Hub id or directory that the body loads; None if unknown.
    """
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {source} cannot be read ({first_line(error)}); download or copy it again"
        ) from error
