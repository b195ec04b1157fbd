"""The licence of the model that is optimized, as the front matter of its card states it."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

from ..errors import CheckpointError
from ..trust.documents import parse_yaml, read_text
from ..trust.lookup import Where
from ..trust.text import tag

log = logging.getLogger(__name__)

CARD = "README.md"


def licence_of(source: Any, revision: str | None = None) -> str:
    """Return the name of the licence of a model, and an empty string if its card is not on this machine or names none.

    Args:
        source: a directory, or a Hub id whose card has been downloaded.
        revision: branch, tag or commit of a Hub model.
    """
    text = os.fspath(source) if source is not None else ""
    if not text or os.path.isfile(text):
        return ""
    try:
        path = Where(text, "", {"revision": revision, "local_files_only": True}).find(CARD)
        card = read_text(path) if path is not None else ""
        front = re.match(r"---\r?\n(.*?)\r?\n---", card, re.DOTALL)
        data = parse_yaml(front[1], path) if front is not None else {}
    except CheckpointError as error:
        log.debug("the card of %s is not read: %s", text, error)
        return ""
    found = data.get("license") if isinstance(data, dict) else None
    return tag(found) if isinstance(found, str) else ""
