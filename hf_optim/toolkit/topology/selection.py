"""Select modules by patterns: names, globs, regular expressions and class names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ...errors import ModelError
from ...trust.patterns import compile_pattern
from .experts import ExpertLinear
from .linear_layers import is_linear


class PatternError(ModelError):
    """A pattern of ``targets`` or ``skip`` selects nothing, or its regular expression is refused."""


def match(
    names: Iterable[str] | Mapping[str, nn.Module],
    targets: Iterable[str],
    skip: Iterable[str] = (),
    optional: Iterable[str] = (),
) -> list[str]:
    """Return the names that a pattern of ``targets`` selects and no pattern of ``skip``, in the order of ``names``.

    A pattern is an exact name (``model.layers.0.mlp.up_proj``), a glob (``*.mlp.*``; ``*`` crosses dots), a regular
    expression after ``re:`` that must match from the beginning, or, if ``names`` maps to modules, a class name:
    ``Linear`` selects every linear layer, including ``Conv1D`` and ``ExpertLinear``; any other name selects the class
    and its subclasses.

    Raises ``PatternError`` if a pattern of ``targets`` or ``skip`` selects nothing, unless it is also in ``optional``,
    or if ``trust.patterns`` refuses its regular expression. The message lists those patterns with the nearest names.
    """
    modules = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names)
    targets, skip, optional = list(targets), list(skip), set(optional)
    selected = {pattern: _select(modules, pattern) for pattern in (*targets, *skip)}
    missing = [pattern for pattern, found in selected.items() if not found and pattern not in optional]
    if missing:
        raise PatternError("nothing matches " + "; ".join(_nearest(modules, pattern) for pattern in missing))
    wanted = set().union(*(selected[pattern] for pattern in targets))
    unwanted = set().union(*(selected[pattern] for pattern in skip))
    return [name for name in modules if name in wanted and name not in unwanted]


def matches_class(modules: Iterable[Any], pattern: str) -> bool:
    """Return True if a pattern is the name of a class that one of the modules has, ``Linear`` included."""
    return any(module is not None and _is_a(module, pattern) for module in modules)


def _select(modules: Mapping[str, nn.Module | None], pattern: str) -> set[str]:
    """Return the names that one pattern selects."""
    if pattern.startswith("re:"):
        try:
            expression = compile_pattern(pattern[3:])
        except ValueError as error:
            raise PatternError(str(error)) from error
        return {name for name in modules if expression.match(name)}
    return {
        name
        for name, module in modules.items()
        if name == pattern or fnmatch.fnmatchcase(name, pattern) or (module is not None and _is_a(module, pattern))
    }


def _is_a(module: nn.Module, class_name: str) -> bool:
    linear = is_linear(module) or isinstance(module, ExpertLinear)
    return (class_name == "Linear" and linear) or any(c.__name__ == class_name for c in type(module).__mro__)


def _nearest(modules: Mapping[str, nn.Module | None], pattern: str) -> str:
    """Return the pattern with the nearest names, for a message."""
    candidates = [
        *modules,
        *dict.fromkeys(type(module).__name__ for module in modules.values() if module is not None),
    ]
    near = difflib.get_close_matches(pattern.removeprefix("re:"), candidates, n=3, cutoff=0.3)
    return f"{pattern!r} (nearest: {', '.join(near)})" if near else f"{pattern!r} ({len(modules)} names to choose from)"
