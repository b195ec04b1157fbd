"""Fit ``choice`` to the times of sweeps, and say what the choice loses on shapes that the fit did not see.

    python -m hf_optim_kernels.common.calibrate sweep.json ... [--out choice.json]

Reads files of ``sweep`` (a later file replaces times of the same configuration and shape). Prints, for every product,
the time of the chosen configuration over that of the fastest measured one, with each shape left out of the fit in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import operator
import statistics
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from . import choice
from .choice import Config, Kind

PROCESSORS = 132  # of an H200
# With fewer, the guesses of the products were within a few percent of the fastest, and closer than the fit.
LEAST_ROWS = 65
MANY_ROWS = 4096
# Kernels that decode the weight again for every block of rows, and the most rows that they are predicted for: with
# 2,048 and 4,096, a library's product of the weight, decoded once, took 0.70 to 1.10 times as long (median 0.96).
MOST_ROWS = {"specialized": 1024}
PARTS_NAMES = ("SPLIT", "PARTS")
# Tiles that a library's product may have, in rows and columns.
LIBRARY_TILES = ((128, 256), (256, 128), (128, 128), (64, 128), (128, 64), (64, 256), (256, 64), (64, 64))
RESIDENT, LATENCY = (1, 2, 3, 4), (1.0, 1.3, 1.7, 2.2, 3.0)
Time = dict[str, Any]


def read(paths: Iterable[Path]) -> list[Time]:
    """Return the times of files, without failures."""
    found: dict[tuple, Time] = {}
    for path in paths:
        for time in json.loads(path.read_text(encoding="utf-8"))["times"]:
            key = (time["op"], time["N"], time["K"], time["M"], tuple(sorted(time["config"].items())))
            if not isinstance(time["us"], str):
                found[key] = time
            else:
                found.pop(key, None)
    return list(found.values())


def split_config(config: Config) -> tuple[Config, str | None, int]:
    """Return a configuration with one part, the name of the parts, and how many they are."""
    name = next((n for n in PARTS_NAMES if n in config), None)
    # These do not share tiles, whatever the configuration says.
    if name is None or config.get("KERNEL", config.get("path")) in ("persistent", "library", "torch", "dense"):
        return config, None, 1
    # The order of names stays: launches may read configurations by position.
    return config | {name: 1}, name, config[name]


def fit(times: list[Time]) -> dict[str, tuple[Kind, ...]]:
    """Return kinds fitted to times: every kernel with its tiles by itself."""
    groups: dict[tuple, list[tuple[Time, int]]] = defaultdict(list)
    for time in times:
        most = MOST_ROWS.get(time["config"].get("KERNEL"), time["M"])
        if not LEAST_ROWS <= time["M"] <= most:
            continue
        config, name, parts = split_config(time["config"])
        groups[time["op"], name, tuple(config.items())].append((time, parts))
    found: dict[str, list[Kind]] = defaultdict(list)
    for (op, name, items), group in sorted(groups.items(), key=str):
        if len(group) >= 4:
            found[op].append(_fit_kind(dict(items), name, group))
    return {op: tuple(each) for op, each in found.items()}


def _fit_kind(config: Config, name: str | None, group: list[tuple[Time, int]]) -> Kind:
    rows = [time["M"] for time, _ in group]
    named = (config.get("BLOCK_M") or 0, config.get("BLOCK_N") or 0)
    # The tiles of a library are those that fit its times best: of one of its algorithms, by number, or of a product
    # that chooses for itself, whose times rise as with small ones.
    is_library = "library" in (config.get("path"), config.get("KERNEL"))
    tiles = (named,) if all(named) else LIBRARY_TILES if is_library else LIBRARY_TILES[:1]
    best: tuple[float, tuple[int, int], int, float, list[float]] | None = None
    residents = (1,) if config.get("KERNEL") == "persistent" or len(tiles) > 1 else RESIDENT
    for tile, resident, latency in itertools.product(tiles, residents, LATENCY):
        # Relative errors: each row is divided by its time.
        matrix = [
            [
                value / t["us"]
                for value in choice.features(tile, t["M"], t["N"], t["K"], parts, PROCESSORS, resident, latency)
            ]
            for t, parts in group
        ]  # fmt: skip
        terms = _least_squares(matrix)
        errors = (sum(term * value for term, value in zip(terms, row, strict=True)) - 1 for row in matrix)
        loss = sum(error * error for error in errors) / len(matrix)
        if best is None or loss < best[0]:
            best = (loss, tile, resident, latency, terms)
    assert best is not None
    _, tile, resident, latency, terms = best
    programs = [choice.count_programs(tile, t["M"], t["N"], parts) for t, parts in group]
    # A bucket of rows is a power of two: a kind measured on 64 rows serves from 33 on.
    splits = tuple(sorted({parts for _, parts in group}))
    # With thousands of rows the time is that of the rounds, so what was measured there holds for more.
    most = max(rows) if max(rows) < MANY_ROWS else 4 * max(rows)
    measured_rows, measured_programs = (min(rows) // 2 + 1, most), (min(programs), max(programs))
    return Kind(
        config,
        tile,
        name,
        measured_rows,
        measured_programs,
        splits,
        max(t["K"] for t, _ in group),
        resident,
        latency,
        tuple(round(t, 5) for t in terms),
    )


def _least_squares(matrix: list[list[float]], weight: float = 1e-4, passes: int = 60) -> list[float]:
    """Return terms >= 0 with the least squares of ``matrix @ terms - 1``, by coordinate descent."""
    count = len(matrix[0])
    columns = list(zip(*matrix, strict=True))
    gram = [[sum(map(operator.mul, a, b)) for b in columns] for a in columns]
    goal = [sum(column) for column in columns]
    terms = [0.0] * count
    for i in range(count):
        # Terms that the times do not tell apart are kept small, each on its own scale.
        gram[i][i] *= 1 + weight
    for _ in range(passes):
        for i in range(count):
            if gram[i][i] > 0:
                rest = goal[i] - sum(map(operator.mul, gram[i], terms)) + gram[i][i] * terms[i]
                terms[i] = max(0.0, rest / gram[i][i])
    return terms


def regrets(times: list[Time], kinds: dict[str, tuple[Kind, ...]]) -> dict[str, list[tuple[float, str]]]:
    """Return for every product the time of the choice over the least one, and where: only among what was measured."""
    cells: dict[tuple, list[Time]] = defaultdict(list)
    for time in times:
        if time["M"] >= LEAST_ROWS:
            cells[time["op"], time["N"], time["K"], time["M"]].append(time)
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for (op, N, K, M), group in cells.items():
        predicted = []
        for time in group:
            config, name, parts = split_config(time["config"])
            kind = next((k for k in kinds.get(op, ()) if k.config == config and k.parts == name), None)
            if kind is not None and kind.rows[0] <= M <= kind.rows[1]:
                predicted.append((kind.time(M, N, K, parts, PROCESSORS), time["us"]))
        if predicted:
            found[op].append((min(predicted)[1] / min(time["us"] for time in group), f"{N}x{K} M={M}"))
    return found


def dumps(kinds: dict[str, tuple[Kind, ...]]) -> str:
    """Return kinds as JSON, one to a line."""
    blocks = []
    for op in sorted(kinds):
        lines = ",\n".join("  " + json.dumps(vars(kind)) for kind in kinds[op])
        blocks.append(f"{json.dumps(op)}: [\n{lines}\n]")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def report(times: list[Time]) -> None:
    """Print regrets, with each shape left out of the fit in turn."""
    collected: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for shape in sorted({(time["N"], time["K"]) for time in times}):
        kinds = fit([time for time in times if (time["N"], time["K"]) != shape])
        held_out = [time for time in times if (time["N"], time["K"]) == shape]
        for op, each in regrets(held_out, kinds).items():
            collected[op] += each
    for op, each in sorted(collected.items()):
        worst, where = max(each)
        values = [value for value, _ in each]
        above = sum(value > 1.05 for value in values)
        print(f"{op:12s} {len(each):4d} cells, median {statistics.median(values):.3f}, mean "
              f"{statistics.fmean(values):.3f}, worst {worst:.2f} ({where}), above 1.05: {above}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("sweeps", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, help="write the kinds here")
    parser.add_argument("--no-report", action="store_true")
    options = parser.parse_args()
    times = read(options.sweeps)
    if not options.no_report:
        report(times)
    if options.out:
        options.out.write_text(dumps(fit(times)), encoding="utf-8")


if __name__ == "__main__":
    main()
