"""The cells of the comparison with other tools: which there are, their order, and the file that keeps them."""

from __future__ import annotations

import fnmatch
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUBJECTS = ("babyllama-1m", "stories260k", "MiniLM, STS-B", "SST-2 classifier")
BITS = (4, 3, 2)
GROUP = 32
GROUPS = (GROUP, None)
DRAWS = 3
OURS = ("gptq", "awq, rtn", "signround", "best")
PEERS = ("AutoRound", "llm-compressor GPTQ", "llm-compressor AWQ")
METHODS = (*OURS, *PEERS)
LATER = ("awq, rtn", "llm-compressor AWQ")  # after the draws of the other methods


@dataclass(frozen=True)
class Cell:
    """One run of one method.

    Attributes:
        subject: the model, one of ``SUBJECTS``.
        bits: of a weight.
        group: inputs that share a scale; None for one scale per output channel.
        method: one of ``METHODS``.
        draw: number of the draw of calibration data, which is its seed.
    """

    subject: str
    bits: int
    group: int | None
    method: str
    draw: int

    @property
    def key(self) -> str:
        return f"{self.subject} | {self.bits} | {self.group or 'channel'} | {self.method} | {self.draw}"

    @property
    def symmetric(self) -> bool:
        """No zero points at 4 and 3 bits; at 2 bits, where one code of four would be lost, there are."""
        return self.bits > 2

    @property
    def ours(self) -> bool:
        return self.method in OURS


def all_cells(
    subjects: Sequence[str] = SUBJECTS,
    bits: Sequence[int] = BITS,
    groups: Sequence[int | None] = GROUPS,
    methods: Sequence[str] = METHODS,
    draws: int = DRAWS,
) -> list[Cell]:
    """Return the cells, the most telling first: groups before channels, a draw of each before further draws."""
    cells = [
        Cell(subject, width, group, method, draw)
        for subject in subjects
        for width in bits
        for group in groups
        for method in methods
        for draw in range(draws)
    ]
    return sorted(cells, key=lambda c: (c.group is None, c.method in LATER, c.draw, c.ours))


def group_size_of(columns: int, group: int | None) -> int:
    """Return how many of ``columns`` inputs share a scale: the largest divisor up to ``group``; None: all of them.

    Where a group does not divide a layer's width (172 in stories260k), every method is given this size.
    """
    if group is None:
        return columns
    return next(size for size in range(min(group, columns), 0, -1) if columns % size == 0)


def matching(names: Iterable[str], patterns: Sequence[str]) -> list[str]:
    """Return the names that match one of the patterns, ``*`` for anything. Raises ``SystemExit`` if none does."""
    names = list(names)
    found = [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]
    if not found:
        raise SystemExit(f"no name matches {' '.join(patterns)}; there are: {'; '.join(names)}")
    return found


class Results:
    """The file with the results, written again after each cell, so that a stopped run can go on.

    ``{"dense": {subject: {"quality", "weights"}}, "cells": {key: result}}``; ``weights`` is a hash of the model's. A
    result has ``quality``, ``seconds``, ``processor_seconds``, ``peak_bytes``, ``versions``; or a reason, ``failed``.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        self.dense: dict[str, dict[str, Any]] = found.get("dense", {})
        self.cells: dict[str, dict[str, Any]] = found.get("cells", {})

    def missing(self, cells: Iterable[Cell], again: bool = False) -> Iterator[Cell]:
        """Yield the cells without a result; ``again``: also those whose run failed."""
        for cell in cells:
            known = self.cells.get(cell.key)
            if known is None or (again and "failed" in known):
                yield cell

    def set_dense(self, subject: str, quality: float, weights: str) -> None:
        """Keep the quality of the model itself. Raises ``SystemExit`` if the file's cells are of other weights."""
        known = self.dense.setdefault(subject, {"quality": quality, "weights": weights})
        if known["weights"] != weights:
            raise SystemExit(
                f"{self.path}: the cells of {subject} are of other weights ({known['weights']}, here {weights}): give "
                "that model, or another file of results"
            )

    def add(self, cell: Cell, result: dict[str, Any]) -> None:
        self.cells[cell.key] = result
        self.write()

    def write(self) -> None:
        """Write the file in one step, a line for each cell, in the order of the names."""
        order = {cell.key: number for number, cell in enumerate(all_cells())}
        keys = sorted(self.cells, key=lambda key: (order.get(key, len(order)), key))
        lines = {
            "dense": [f"{json.dumps(name)}: {json.dumps(self.dense[name])}" for name in sorted(self.dense)],
            "cells": [f"{json.dumps(key)}: {json.dumps(self.cells[key])}" for key in keys],
        }
        parts = [f' "{name}": {{\n  ' + ",\n  ".join(rows) + "\n }" for name, rows in lines.items()]
        fresh = self.path.with_name(f".{self.path.name}.new")
        fresh.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
        os.replace(fresh, self.path)
