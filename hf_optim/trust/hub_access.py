"""Look for a model before other libraries do: they retry for long, and name other causes."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ModelError
from .bounds import shown

# Longer than any answer of a Hub that can be reached; its client retries for most of a minute.
SECONDS = 5.0


def require_findable(source: str, revision: str | None = None) -> None:
    """Raise ``ModelError`` for a directory that does not exist, and for a Hub id that is neither cached nor reachable.

    Nothing is downloaded. A Hub that can be reached may still not have the model.
    """
    if os.path.isdir(source):
        return
    if os.path.exists(source):
        raise ModelError(f"{shown(source)} is a file: name the directory of a checkpoint, or a Hub id")
    if looks_like_path(source):
        raise ModelError(f"no such directory: {shown(source)}")
    if _is_cached(source, revision):
        return
    from huggingface_hub import constants

    missing = f"no model {shown(source)}: there is no such directory, it is not in the cache of the Hub"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{missing}, and HF_HUB_OFFLINE is set, so that the Hub is not asked")
    if not _is_reachable(constants.ENDPOINT):
        raise ModelError(
            f"{missing}, and {constants.ENDPOINT} cannot be reached (offline? HF_HUB_OFFLINE=1 uses what is cached "
            "without asking the Hub)"
        )


def looks_like_path(source: str) -> bool:
    """Return True for text that cannot be a Hub id: absolute, relative to a named place, or several levels deep."""
    return Path(source).is_absolute() or source.startswith((".", "~")) or source.count("/") > 1 or "\\" in source


def _is_cached(source: str, revision: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        return isinstance(try_to_load_from_cache(source, "config.json", revision=revision), str)
    except HFValidationError as error:
        raise ModelError(f"no such directory, and not a Hub id: {shown(source)}") from error


def _is_reachable(endpoint: str) -> bool:
    """Return True if something answers at the address of the Hub, whatever it answers."""
    from huggingface_hub import get_session

    try:
        get_session().head(endpoint, timeout=SECONDS)
    except Exception:  # of the HTTP library that huggingface_hub uses; which one depends on its version
        return False
    return True
