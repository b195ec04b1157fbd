"""The table of the sweep (docs/architectures.md)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .architectures import Architecture
from .recipes import RECIPES


def shares(rows: Sequence[Architecture], results: Mapping[str, Any]) -> str:
    """Return the counts of a sweep as text."""
    names = list(dict.fromkeys(row.name for row in rows if row.name in results))
    able = [name for name in names if not results[name]["stock"]]
    lines = [f"{len(names)} classes, {len(names) - len(able)} that stock transformers cannot build, run and reload"]
    for recipe in RECIPES:
        found = Counter(results[name]["recipes"].get(recipe, ["-"])[0] for name in able)
        lines.append(f"{recipe:10} " + ", ".join(f"{key} {value}" for key, value in found.most_common()))
    return "\n".join(lines)


def write_table(path: Path, rows: Sequence[Architecture], results: Mapping[str, Any]) -> None:
    """Write the table."""
    path.write_text(shares(rows, results))
