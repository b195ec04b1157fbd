"""Nothing that ships reads what is newer than the oldest Python that pyproject.toml names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

OLDEST = (3, 10)
# Of the standard library since 3.11.
NEWER = {
    "tomllib", "asyncio.TaskGroup", "asyncio.timeout", "contextlib.chdir", "datetime.UTC", "enum.EnumCheck",
    "enum.FlagBoundary", "enum.ReprEnum", "enum.StrEnum", "enum.member", "enum.nonmember", "enum.verify",
    "hashlib.file_digest", "inspect.getmembers_static", "itertools.batched", "logging.getHandlerByName",
    "logging.getLevelNamesMapping", "math.cbrt", "math.exp2", "math.sumprod", "operator.call",
    "os.process_cpu_count", "sys.exception", "typing.LiteralString", "typing.Never", "typing.NotRequired",
    "typing.Required", "typing.Self", "typing.TypeVarTuple", "typing.Unpack", "typing.assert_never",
    "typing.override", "warnings.deprecated",
}  # fmt: skip


def read_names(tree: ast.AST) -> Iterator[str]:
    """Yield what a module reads of others: ``module.name`` of imports from, and of attributes of a bare name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            yield f"{node.value.id}.{node.attr}"


@pytest.mark.parametrize("folder", ["hf_optim", "plugins", "kernels"])
def test_what_ships_runs_on_the_oldest_python(folder):
    assert f'requires-python = ">={OLDEST[0]}.{OLDEST[1]}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    found = {}
    for path in sorted(Path(ROOT / folder).rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), feature_version=OLDEST)
        if newer := NEWER & set(read_names(tree)):
            found[str(path.relative_to(ROOT))] = newer
    assert found == {}


def test_newer_names_are_found():
    source = "import enum, tomllib\nfrom typing import Self, Any\nclass A(enum.StrEnum): pass\n"
    assert set(read_names(ast.parse(source))) & NEWER == {"tomllib", "typing.Self", "enum.StrEnum"}
