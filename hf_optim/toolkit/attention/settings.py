"""Settings of a pattern as they stand in a configuration file: checked before they are used.

None has a default: a setting that is missing was removed, and what it was is not known.

This file is stored beside checkpoints, so it imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = 2**31 - 1  # kernels count positions in 32 bits
MOST = 4096  # entries of a list


def whole(settings: Mapping[str, Any], name: str, low: int = 0, high: int = LARGEST) -> int:
    """Return a whole number of the settings. Raises ``ValueError`` if it is missing or outside of its range."""
    return _whole(_given(settings, name), name, low, high)


def _whole(value: Any, name: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"the attention pattern has {_named(name, value)}, not a whole number from {low} to {high}")
    return value


def chosen(settings: Mapping[str, Any], name: str, among: tuple[str, ...]) -> str:
    """Return a word of the settings. Raises ``ValueError`` if it is missing or not one of those it can be."""
    value = _given(settings, name)
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"the attention pattern has {_named(name, value)}, not one of {', '.join(among)}")
    return value


def flag(settings: Mapping[str, Any], name: str) -> bool:
    """Return a setting that is true or false. Raises ``ValueError`` if it is missing or anything else."""
    value = _given(settings, name)
    if not isinstance(value, bool):
        raise ValueError(f"the attention pattern has {_named(name, value)}, not true or false")
    return value


def wholes(settings: Mapping[str, Any], name: str, low: int = 0, high: int = LARGEST) -> tuple[int, ...]:
    """Return a list of whole numbers of the settings, maybe empty. Raises ``ValueError`` for anything else."""
    value = _given(settings, name)
    if not isinstance(value, list) or len(value) > MOST:
        raise ValueError(f"the attention pattern has {_named(name, value)}, not a list of at most {MOST} numbers")
    return tuple(_whole(entry, name, low, high) for entry in value)


def _given(settings: Mapping[str, Any], name: str) -> Any:
    if name not in settings:
        raise ValueError(
            f"the attention pattern lacks {name}: it was removed from the configuration, or the checkpoint is older "
            "than this setting. trust_remote_code=True loads a checkpoint by the code that was saved with it"
        )
    return settings[name]


def _named(name: str, value: Any) -> str:
    """Return ``name=value`` for a message: a number as it is, other values quoted, all of bounded length."""
    if isinstance(value, (bool, float)) or value is None:
        return f"{name}={value}"
    if isinstance(value, int):
        return f"{name}={value}" if abs(value) < 10**40 else f"{name} of {value.bit_length()} bits"
    if isinstance(value, str):
        return f"{name}={value[:40]!a}"
    return f"{name} of the type {type(value).__name__}"


class ReadSettings(Mapping[str, Any]):
    """Settings that know which of them were read: what nothing reads is misspelt, or meant for something else."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._read = settings, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._settings[name]

    def __contains__(self, name: object) -> bool:
        return name in self._settings

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def require_all_read(self) -> None:
        """Raise ``ValueError`` if some were not read."""
        unread = sorted(str(name)[:40] for name in self._settings if name not in self._read)
        if unread:
            raise ValueError(f"the attention pattern has settings that it does not know: {unread[:4]}")
