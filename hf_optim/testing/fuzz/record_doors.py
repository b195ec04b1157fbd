"""Doors for records and for the results of benchmarks, which cards and tables are made from."""

from __future__ import annotations

from pathlib import Path
from random import Random

from ...checkpoints.hub import _require_finished
from ...evaluation.bench import table
from ...evaluation.bench.results import FILE, Results
from ...evaluation.cards.card import Card
from ...evaluation.cards.index import render_index
from ...runs.record import FILE_NAME, Record
from .door import Door, WrongResult
from .examples import Examples
from .mutations import mutate_json


def _write_record(examples: Examples, folder: Path, random: Random) -> Path:
    folder.mkdir(parents=True)
    (folder / FILE_NAME).write_bytes(mutate_json(examples.record, random))
    return folder


def _require_inside(home: Path, folder: Path) -> None:
    stray = [path for path in home.rglob("*") if path.is_file() and not path.is_relative_to(folder)]
    if stray:
        raise WrongResult(f"{stray[0]} was written outside {folder}")


def _card(examples: Examples, home: Path, random: Random) -> None:
    folder = _write_record(examples, home / "card", random)
    Card(Record.read(folder), folder).write()
    _require_inside(home, folder)


def _index(examples: Examples, home: Path, random: Random) -> None:
    for name in ("a", "b"):
        _write_record(examples, home / "all" / name, random)
    render_index(home / "all")
    _require_inside(home, home / "all")


def _push(examples: Examples, home: Path, random: Random) -> None:
    folder = _write_record(examples, home / "card", random)
    for name in ("config.json", "README.md", "model.safetensors"):
        (folder / name).write_text("{}")
    _require_finished(folder)


def _bench(examples: Examples, home: Path, random: Random) -> None:
    (home / "bench").mkdir()
    (home / "bench" / FILE).write_bytes(mutate_json(examples.bench_results, random))
    table.publish(Results.load(home / "bench"), home / "bench")
    _require_inside(home, home / "bench")


DOORS = (
    Door("record", "card", _card),
    Door("record", "index", _index),
    Door("record", "push", _push),
    Door("record", "bench", _bench),
)
