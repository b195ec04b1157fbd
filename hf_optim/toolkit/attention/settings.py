"""Settings of a pattern as they stand in a configuration file: checked before they are used.

This file is stored beside checkpoints, so it imports only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

LARGEST = 2**31 - 1  # kernels count positions in 32 bits
MOST = 4096  # entries of a list


def whole(settings: Mapping[str, Any], name: str, low: int = 0, high: int = LARGEST, default: int | None = None) -> int:
    """Return a whole number of the settings. Raises ``ValueError`` if it is missing or outside of its range."""
    value = settings.get(name, default)
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(
            f"the attention pattern has {name}={str(value)[:40]!r}, not a whole number from {low} to {high}"
        )
    return value


def chosen(settings: Mapping[str, Any], name: str, among: tuple[str, ...]) -> str:
    """Return a word of the settings. Raises ``ValueError`` if it is not one of those it can be."""
    value = settings.get(name)
    if not isinstance(value, str) or value not in among:
        raise ValueError(f"the attention pattern has {name}={str(value)[:40]!r}, not one of {', '.join(among)}")
    return value


def wholes(settings: Mapping[str, Any], name: str, low: int = 0, high: int = LARGEST) -> tuple[int, ...]:
    """Return a list of whole numbers of the settings, which may be missing. Raises ``ValueError`` for anything else."""
    value = settings.get(name) or []
    if not isinstance(value, list) or len(value) > MOST:
        raise ValueError(f"the attention pattern has {name}={str(value)[:40]!r}, not a list of at most {MOST} numbers")
    return tuple(whole({name: entry}, name, low, high) for entry in value)


class ReadSettings(Mapping[str, Any]):
    """Settings that know which of them were read: what nothing reads is misspelt, or meant for something else."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self._settings, self._read = settings, set[str]()

    def __getitem__(self, name: str) -> Any:
        self._read.add(name)
        return self._settings[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._settings)

    def __len__(self) -> int:
        return len(self._settings)

    def require_all_read(self) -> None:
        """Raise ``ValueError`` if some were not read."""
        unread = sorted(str(name)[:40] for name in self._settings if name not in self._read)
        if unread:
            raise ValueError(f"the attention pattern has settings that it does not know: {unread[:4]}")
