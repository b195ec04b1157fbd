"""Choose the configuration of a product for a shape that was not measured: the one with the least predicted time.

The time of a configuration is the sum of what its launches cost whatever they compute, of passes over the inputs, the
weight and the partial sums, and of rounds in which every multiprocessor runs its programs. A round takes the time of
one program, or of those that share a multiprocessor one after the other, whichever is longer. The coefficients of each
``Kind``, a kernel with its tiles, are fitted to measured times (``calibrate``) and shipped in ``tables/choice.json``;
the number of multiprocessors is that of the device. All of this is arithmetic on the shape: the same shape has the same
configuration on every host.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Config = dict[str, Any]
FILE = Path(__file__).parent / "tables" / "choice.json"
# Columns in a part of a tile, at least.
LEAST_COLUMNS = 256
# How far the number of programs may be from those measured.
MARGIN = 1.25
# Times more columns of the weight than measured that a kind is predicted for, where another kind was measured on more:
# ``wna16``'s ``wide``, measured up to 4,096 columns, took 1.2 to 1.6 times the predicted time from 13,824 on.
REACH = 2
_MILLION = 1e6


@dataclass(frozen=True)
class Kind:
    """A kernel with its tiles, and what its times depend on.

    Attributes:
        config: names and values, with one part.
        tile: rows and columns of the result that a program computes; of a library's product, which does not name them,
            those that fit its times best.
        parts: the name of the number of parts that share a tile, or None where tiles are not shared.
        rows: the rows, least and most, that it was measured on.
        programs, splits: the programs, least and most, and the numbers of parts that it was measured with: others are
            not predicted.
        columns: the most columns of the weight that it was measured on.
        resident: programs that a multiprocessor holds at a time.
        latency: the time of a program that is alone on its multiprocessor, over that of one among many.
        terms: microseconds: of the launches; per million inputs, weights and partial sums; of a round; and per thousand
            columns of a program in a round.
    """

    config: Config
    tile: tuple[int, int]
    parts: str | None
    rows: tuple[int, int]
    programs: tuple[int, int]
    splits: tuple[int, ...]
    columns: int
    resident: int
    latency: float
    terms: tuple[float, ...]

    def time(self, M: int, N: int, K: int, parts: int, processors: int) -> float:
        """Return the predicted microseconds."""
        found = features(self.tile, M, N, K, parts, processors, self.resident, self.latency)
        return sum(term * value for term, value in zip(self.terms, found, strict=True))


def features(
    tile: tuple[int, int], M: int, N: int, K: int, parts: int, processors: int, resident: int, latency: float
) -> tuple[float, ...]:
    """Return what ``Kind.terms`` are multiplied with."""
    programs = count_programs(tile, M, N, parts)
    full, rest = divmod(programs, processors * resident)
    rounds = full + (rest > 0)
    busy = full * max(latency, resident) + (max(latency, -(-rest // processors)) if rest else 0.0)
    sums = M * N * parts if parts > 1 else 0
    return (
        1.0, M * K / _MILLION, N * K / _MILLION, sums / _MILLION, float(rounds), busy * K / (1000 * parts),
    )  # fmt: skip


def count_programs(tile: tuple[int, int], M: int, N: int, parts: int) -> int:
    """Return the programs of a launch."""
    return -(-M // tile[0]) * -(-N // tile[1]) * parts


def best(
    op: str, M: int, N: int, K: int, processors: int, usable: Callable[[Config], bool] = lambda config: True
) -> Config | None:
    """Return the configuration with the least predicted time; None if ``op`` was not measured near ``M`` rows.

    Args:
        op: the name in tables.
        usable: False for configurations that cannot run here.
    """
    found = ranked(op, M, N, K, processors, usable)
    return found[0][1] if found else None


def ranked(
    op: str, M: int, N: int, K: int, processors: int, usable: Callable[[Config], bool] = lambda config: True
) -> list[tuple[float, Config]]:
    """Return predicted microseconds and configurations, the fastest first."""
    found = []
    near = [kind for kind in kinds().get(op, ()) if kind.rows[0] <= M <= kind.rows[1] and usable(kind.config)]
    longest = max((kind.columns for kind in near), default=0)
    for kind in near:
        if kind.columns < longest and REACH * kind.columns < K:
            continue
        for parts in kind.splits:
            if parts > 1 and parts * LEAST_COLUMNS > K:
                break
            fewest, most_programs = kind.programs
            if parts > 1 and not fewest <= MARGIN * count_programs(kind.tile, M, N, parts) <= MARGIN**2 * most_programs:
                continue
            config = kind.config | ({kind.parts: parts} if kind.parts else {})
            found.append((kind.time(M, N, K, parts, processors), config))
    return sorted(found, key=lambda pair: pair[0])


@functools.cache
def kinds() -> dict[str, tuple[Kind, ...]]:
    """Return the shipped kinds by the name of the product."""
    if not FILE.exists():
        return {}
    return loads(json.loads(FILE.read_text(encoding="utf-8")))


def loads(stored: Mapping[str, Any]) -> dict[str, tuple[Kind, ...]]:
    """Return kinds from their JSON form."""
    return {op: tuple(_kind(one) for one in each) for op, each in stored.items()}


def _kind(stored: Mapping[str, Any]) -> Kind:
    values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
    return Kind(**values)
