"""The demo corpus: the source of the Python standard library, read from the running interpreter.

Nothing is downloaded. The model in ``demo_model`` was trained on the ``train`` split; the ``held_out`` split (the
modules in ``HELD_OUT``, which were not used for training) is for evaluation.

Included: every ``*.py`` file under ``sysconfig.get_path("stdlib")``, decoded by its own encoding cookie, with newlines
as ``\\n``. Excluded by path: tests (``test``, ``tests``, ``idle_test``), installed packages (``site-packages``,
``dist-packages``), byte code (``__pycache__``), build records (``config-*``, ``_sysconfigdata*.py``, which name the
build machine), and generated tables (``encodings``, ``pydoc_data``, ``html/entities.py``).

The text differs slightly between Python versions; the module lists below do not. Every name in ``HELD_OUT`` exists in
Python 3.10 to 3.14. The source is under the PSF license.
"""

from __future__ import annotations

import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

HELD_OUT: tuple[str, ...] = (
    "argparse",
    "calendar",
    "configparser",
    "csv",
    "dataclasses",
    "difflib",
    "fractions",
    "heapq",
    "json",
    "queue",
    "shlex",
    "statistics",
    "tarfile",
    "textwrap",
)
"""Top-level modules and packages excluded from training, by import name."""

_SKIPPED_PARTS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
)
_SKIPPED_FILES = frozenset({"html/entities.py"})


def library(root: str | Path | None = None) -> Path:
    """Return the folder of the corpus: ``root``, or the standard library of the running Python."""
    return Path(root or sysconfig.get_path("stdlib"))


def train_files(root: str | Path | None = None) -> list[Path]:
    """Return every included file (see the module docstring) outside ``HELD_OUT``, sorted by relative path."""
    return [path for name, path in _included(library(root)) if name not in HELD_OUT]


def held_out_files(root: str | Path | None = None) -> list[Path]:
    """Return every included file of the modules and packages in ``HELD_OUT``, sorted by relative path."""
    return [path for name, path in _included(library(root)) if name in HELD_OUT]


def read(files: Iterable[str | Path]) -> Iterator[str]:
    """Yield the text of each file, in order; empty files are skipped."""
    for path in files:
        with tokenize.open(path) as file:
            if text := file.read():
                yield text


def texts(split: str, limit_bytes: int | None = None, root: str | Path | None = None) -> Iterator[str]:
    """Yield the texts of one split, one per file, sorted by relative path.

    Args:
        split: ``"train"`` or ``"held_out"``; anything else raises ``ValueError``.
        limit_bytes: stop after this many bytes of UTF-8; the last text is truncated there, at a whole character.
        root: the ``Lib`` folder of another Python; None for the running one.
    """
    try:
        files = {"train": train_files, "held_out": held_out_files}[split](root)
    except KeyError:
        raise ValueError(f"split must be 'train' or 'held_out', not {split!r}") from None
    return read(files) if limit_bytes is None else _truncate(read(files), limit_bytes)


def _included(root: Path) -> list[tuple[str, Path]]:
    """Return ``(top-level module name, path)`` of every included file."""
    relative = (path.relative_to(root) for path in root.rglob("*.py"))
    kept = sorted(path.as_posix() for path in relative if not _is_skipped(path))
    return [(name.split("/")[0].removesuffix(".py"), root / name) for name in kept]


def _is_skipped(path: Path) -> bool:
    return (
        not _SKIPPED_PARTS.isdisjoint(path.parts)
        or path.as_posix() in _SKIPPED_FILES
        or path.parts[0].startswith(("config-", "_sysconfigdata"))
    )


def _truncate(documents: Iterable[str], limit_bytes: int) -> Iterator[str]:
    left = limit_bytes
    for text in documents:
        data = text.encode()
        if len(data) > left:
            text = data[:left].decode(errors="ignore")
        left -= len(data)
        if text:
            yield text
        if left <= 0:
            return
