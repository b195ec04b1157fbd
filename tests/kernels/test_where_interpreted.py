"""Tests that Triton's interpreter runs lie where ``make test`` looks for them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
# A decorator, a parameter, or a module that marks all of its tests.
MARKED = re.compile(r"pytest\.mark\.interpreted|\bon_triton\b|from interpreting import")
OF_FUNCTIONS = re.compile(r"interpreted|on_triton|EVERYWHERE|INTERPRETER")


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


def test_no_interpreted_function_is_left_out_of_make_test():
    """``many`` leaves a case of each function at least; ``slow`` would leave none."""
    checked = 0
    for file in (ROOT / "tests").rglob("test_*.py"):
        text = file.read_text("utf-8")
        if file == Path(__file__) or not MARKED.search(text):
            continue
        tree = ast.parse(text)
        whole = [ast.unparse(node) for node in tree.body if isinstance(node, ast.Assign)]
        ours = any("pytestmark" in line and "interpreted" in line for line in whole)
        assert not (ours and any("pytestmark" in line and "slow" in line for line in whole)), file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                # The decorators, but for the cases that they list, which have marks of their own.
                marks = {ast.unparse(part.func if isinstance(part, ast.Call) else part) for part in node.decorator_list}
                if ours or OF_FUNCTIONS.search("\n".join(map(ast.unparse, node.decorator_list))):
                    checked += 1
                    assert "pytest.mark.slow" not in marks, f"{file}::{node.name}"
    assert checked > 150
