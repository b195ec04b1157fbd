"""The header of a work folder: what its content was made from, so that no other run resumes from it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def is_begun(header: Path, mine: Mapping[str, Any], what: str) -> bool:
    """Return True if there is a header. Raises ``CheckpointError`` if it differs from ``mine``.

    ``what`` begins the message: "the journal in out was made with".
    """
    if not header.is_file():
        return False
    theirs = json.loads(header.read_text(encoding="utf-8"))
    differing = sorted(key for key in mine if mine[key] != theirs.get(key))
    if differing:
        raise CheckpointError(f"cannot resume: {what} another {', '.join(differing)}; start without --resume")
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON atomically."""
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(beside, path)
