"""The code that a technique stores with checkpoints is several modules in one file, where a name means one thing."""

from __future__ import annotations

import ast
import builtins
import symtable
from collections import Counter
from collections.abc import Iterator
from functools import cache

import pytest

from hf_optim.recipes.catalogue import catalogue


@cache
def stored() -> dict[str, str]:
    """Return the source that each technique with code of its own stores, by its name."""
    found = {name: getattr(catalogue().get(name), "remote_code", None) for name in catalogue().names()}
    return {name: code.source for name, code in found.items() if code is not None}


parsed = cache(ast.parse)


def defined(source: str) -> Iterator[str]:
    """Yield the names that statements of a module define, one each time."""
    for node in parsed(source).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            yield from (each.id for each in ast.walk(target) if isinstance(each, ast.Name)) if target else ()


@cache
def imported(source: str) -> dict[str, set[str]]:
    """Return what is imported under each name."""
    found: dict[str, set[str]] = {}
    for node in ast.walk(parsed(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            for each in node.names:
                name = each.asname or each.name.partition(".")[0]
                found.setdefault(name, set()).add(f"{getattr(node, 'module', '')}.{each.name}")
    return found


def repeated(source: str) -> list[str]:
    """Return the names that a module defines more than once, or that it imports from two places, or both."""
    names, others = Counter(defined(source)), imported(source)
    twice = {name for name, count in names.items() if count > 1}
    return sorted(twice | (names.keys() & others.keys()) | {name for name, each in others.items() if len(each) > 1})


def unknown(source: str) -> list[str]:
    """Return the names that a module reads and defines nowhere."""
    scopes, read = [symtable.symtable(source, "stored", "exec")], set()
    known = {*dir(builtins), "__name__", "__file__"}
    known |= {each.get_name() for each in scopes[0].get_symbols() if each.is_assigned() or each.is_imported()}
    while scopes:
        scope = scopes.pop()
        scopes += scope.get_children()
        outer = scope.get_type() == "module"
        read |= {
            each.get_name() for each in scope.get_symbols() if each.is_referenced() and (outer or each.is_global())
        }
    return sorted(read - known)


def test_no_name_of_stored_code_is_defined_twice():
    # The last definition would serve all modules of the file, among them those that mean the first.
    found = {name: repeated(source) for name, source in stored().items()}
    assert len(found) > 20
    assert {name: names for name, names in found.items() if names} == {}


def test_stored_code_reads_no_name_that_was_in_another_module():
    found = {name: unknown(source) for name, source in stored().items()}
    assert {name: names for name, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "twice", "missing"),
    [
        ("def a(): return b\nb: int = 1\n", [], []),
        ("def a(): pass\nclass a: pass\n", ["a"], []),
        ("A, B = 1, 2\nB = 3\n", ["B"], []),
        ("from torch import nn\nfrom other import nn\n", ["nn"], []),
        ("import torch\ntorch: int = 1\n", ["torch"], []),
        ("def a(x): return x + y\n", [], ["y"]),
    ],
)
def test_names_are_found(source, twice, missing):
    assert repeated(source) == twice
    assert unknown(source) == missing
