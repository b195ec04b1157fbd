"""The header of a work folder: what its content was made from, so that another run does not go on with it."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError


def is_begun(header: Path, mine: Mapping[str, Any], what: str) -> bool:
    """Whether there is a header; of one that tells something else than ``mine`` it raises ``CheckpointError``.

    ``what`` names the work in the message: "the journal in out was made with".
    """
    if not header.is_file():
        return False
    theirs = json.loads(header.read_text(encoding="utf-8"))
    differing = sorted(key for key in mine if mine[key] != theirs.get(key))
    if differing:
        raise CheckpointError(f"cannot resume: {what} another {', '.join(differing)}; start without --resume")
    return True


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON, whole or not at all."""
    beside = path.with_suffix(".writing")
    beside.write_text(json.dumps(content, indent=2), encoding="utf-8")
    os.replace(beside, path)
