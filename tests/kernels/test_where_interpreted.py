"""Tests that Triton's interpreter runs lie where ``make test`` looks for them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A decorator, a parameter, or a module that marks all of its tests.
MARKED = re.compile(r"pytest\.mark\.interpreted|\bon_triton\b|from interpreting import")


def test_every_interpreted_test_is_in_make_test():
    runs = re.findall(
        r'TRITON_INTERPRET=1 \$\(PYTEST\) (?:-p \w+ )?(.+?) -m "interpreted', (ROOT / "Makefile").read_text("utf-8")
    )
    assert len(runs) == 3  # the third compiles what was run
    for run in runs:
        paths = [ROOT / path for path in run.split()]
        assert all(path.exists() for path in paths)
        for file in (ROOT / "tests").rglob("test_*.py"):
            if file != Path(__file__) and MARKED.search(file.read_text("utf-8")):
                assert any(path in (file, *file.parents) for path in paths), file
