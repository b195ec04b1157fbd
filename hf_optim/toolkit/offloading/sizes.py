"""Sizes in bytes: ``4GiB``, ``500MB``, ``1073741824``."""

from __future__ import annotations

import re

from ...errors import RecipeError
from ...trust.bounds import shown

UNITS = {"": 1, "B": 1, **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)}}
UNITS |= {f"{p}iB": 1024**n for n, p in enumerate("KMGT", 1)}


def parse_size(value: int | str | None, name: str) -> int | None:
    """Return a size in bytes; None for None. Raises ``RecipeError``, which begins with ``name``."""
    if value is None:
        return None
    if isinstance(value, int) and not isinstance(value, bool):
        found = value
    else:
        match = (
            re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,6})?) ?([A-Za-z]{0,3})", value) if isinstance(value, str) else None
        )
        unit = next((size for key, size in UNITS.items() if match and key.lower() == match[2].lower()), None)
        if match is None or unit is None:
            raise RecipeError(f"{name}: {shown(value)} is not a size: write bytes, or 500MB, 4GiB")
        found = int(float(match[1]) * unit)
    if found < 0:
        raise RecipeError(f"{name}: {shown(value)} is less than nothing")
    return found


def show_size(size: float) -> str:
    """Return bytes as text, with a unit of 1024."""
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
