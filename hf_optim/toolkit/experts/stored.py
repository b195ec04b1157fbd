"""Settings of how experts run, in a model's configuration.

Stock classes cannot express them, so they are entries of a mapping that stock transformers preserves from load to save
without reading it::

    "hf_optim": {"routing": {...}, "exchange": {...}, "buckets": {...}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from ...errors import CheckpointError
from ...trust.bounds import shown

FIELD = "hf_optim"

Setting = TypeVar("Setting")


def store(config: Any, key: str, setting: Any) -> None:
    """Write a setting, a dataclass, into a configuration; None removes it.

    Raises ``CheckpointError`` if something else stands where the settings belong.
    """
    found = getattr(config, FIELD, None) or {}
    if not isinstance(found, Mapping):
        raise CheckpointError(f"config.json: {FIELD} must be a mapping, not {shown(found)}")
    held = {name: value for name, value in found.items() if name != key}
    if setting is not None:
        held[key] = dataclasses.asdict(setting)
    if held:
        setattr(config, FIELD, held)
    elif hasattr(config, FIELD):
        delattr(config, FIELD)


def stored(config: Any, key: str, kind: type[Setting], needed: str = "") -> Setting | None:
    """Return the setting in a configuration, or None. Raises ``CheckpointError`` if it is malformed.

    Args:
        config: of a model.
        key: of the entry.
        kind: its dataclass, whose constructor raises ``ValueError`` for wrong values.
        needed: a field that must be there.
    """
    held = getattr(config, FIELD, None)
    found = held.get(key) if isinstance(held, Mapping) else None
    if found is None:
        return None
    what = f"config.json: {FIELD}.{key}"
    known = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if not isinstance(found, Mapping) or (needed and needed not in found):
        with_it = f" with a {needed}" if needed else ""
        raise CheckpointError(f"{what} must be a mapping{with_it}, not {shown(found)}")
    if unknown := sorted(str(name) for name in found if name not in known):
        raise CheckpointError(f"{what} has the unknown field {shown(unknown[0])}; a newer hf_optim may have written it")
    try:
        return kind(**found)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{what}: {error}") from error
