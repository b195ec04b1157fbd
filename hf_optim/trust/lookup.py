"""Finding the files of a checkpoint, in its directory or on the Hub."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .bounds import first_line
from .files import plain_name, require_inside


@dataclass(frozen=True)
class Where:
    """Where the files of a checkpoint are looked up.

    Attributes:
        source: a directory, a safetensors file, or a Hub id.
        subfolder: the folder in it.
        lookup: keyword arguments for finding files on the Hub (``revision``, ``token``, ``cache_dir`` ...).
    """

    source: str
    subfolder: str
    lookup: Mapping[str, Any]

    def home_of(self, name: str) -> Path | None:
        """Return the folder that holds ``name``, downloaded if it is on the Hub; None if there is no such file.

        Raises ``CheckpointError`` if ``name`` is not a plain relative name, or if the Hub has no such checkpoint.
        """
        plain_name(self.source, name)
        if os.path.isdir(self.source):
            home = Path(self.source, self.subfolder)
            return home if os.path.lexists(home / name) else None
        from transformers.utils.hub import cached_file

        try:
            found = cached_file(
                self.source,
                name,
                subfolder=self.subfolder,
                _raise_exceptions_for_gated_repo=False,
                _raise_exceptions_for_missing_entries=False,
                **{key: value for key, value in self.lookup.items() if value is not None},
            )
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot find the files of {self.source}: {first_line(error)}") from error
        return Path(found).parents[name.count("/")] if found is not None else None

    def find(self, name: str) -> Path | None:
        """Return the regular file ``name``; None if there is no such file. Raises ``CheckpointError``."""
        home = self.home_of(name)
        return require_inside(home, name) if home is not None else None
