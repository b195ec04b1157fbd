"""Format plain-text tables for a terminal."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from typing import Any

from ..errors import printable

MAX_CELL = 20_000


def print_line(text: str) -> None:
    """Print one line; what is not printable in it (names of a checkpoint may hold anything) is escaped."""
    print(printable(text, MAX_CELL))


def print_json(document: Any) -> None:
    """Print one JSON document; a number that JSON does not have (NaN, an infinity) becomes null."""
    print(json.dumps(_plain(document), indent=2, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def result_alone(quiet: bool = False) -> Iterator[None]:
    """Keep standard output for the result, which is printed after the body: what is printed in the body are notes.

    They go to standard error, or with ``quiet`` nowhere.
    """
    with open(os.devnull, "w", encoding="utf-8") if quiet else nullcontext(sys.stderr) as notes, redirect_stdout(notes):
        yield


def print_table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print rows under a header, with the last column wrapped to the width of the terminal."""
    print(format_table(header, rows))


def format_table(header: Sequence[str], rows: Iterable[Sequence[Any]], width: int | None = None) -> str:
    """Return a table as text, with two spaces between columns and the last column wrapped to ``width``."""
    cells = [[printable(str(cell), MAX_CELL) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [list(header), *cells]) for i in range(len(header))]
    indent = sum(widths[:-1]) + 2 * (len(widths) - 1)
    last = max(24, (width or shutil.get_terminal_size((120, 24)).columns) - indent)
    lines = []
    for row in [list(header), ["-" * min(w, last) for w in widths], *cells]:
        start = "".join(cell.ljust(w + 2) for cell, w in zip(row[:-1], widths[:-1], strict=True))
        wrapped = textwrap.wrap(row[-1], last, break_on_hyphens=False) or [""]
        lines.append((start + wrapped[0]).rstrip())
        lines.extend(" " * indent + more for more in wrapped[1:])
    return "\n".join(lines)
