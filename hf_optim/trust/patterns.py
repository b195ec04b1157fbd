"""Regular expressions from recipes and configurations: valid, and matched in a time that grows slowly with the text.

Python's matcher tries all ways to divide a text among the repeats of an expression. With one repeat inside another,
their number doubles with every character.
"""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from .bounds import first_line, shown

# The parser of `re`, which is private: Python 3.10 has it under another name.
parser: Any = importlib.import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")

MAX_LENGTH = 500
MAX_REPEATS = 8
CHOICES = ("BRANCH", "GROUPREF", "GROUPREF_EXISTS")


def compile_pattern(text: str) -> re.Pattern[str]:
    """Compile a regular expression. Raises ``ValueError`` if it is invalid, or could take for ever on some text.

    That is an expression of more than 500 characters or 8 repeats of no fixed number (``*``, ``+``, ``{1,9}``), and one
    with such a repeat, with alternatives or with a reference inside such a repeat.
    """
    if len(text) > MAX_LENGTH:
        raise ValueError(f"the regular expression {shown(text)} has more than {MAX_LENGTH} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = parser.parse(text)
            compiled = re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{shown(text)} is not a regular expression: {first_line(error)}") from error
    if sum(1 for _ in _repeats(tree)) > MAX_REPEATS:
        raise ValueError(f"the regular expression {shown(text)} has more than {MAX_REPEATS} repeats such as .*")
    for body in _repeats(tree):
        if any(True for _ in _repeats(body)) or any(_has(body, name) for name in CHOICES):
            raise ValueError(
                f"the regular expression {shown(text)} repeats a part that itself has repeats or alternatives, which "
                "can take for ever: write it without one inside the other"
            )
    return compiled


def _repeats(tree: Any) -> Iterator[Any]:
    """Yield the bodies of all repeats that can end at different places, at any depth."""
    for operator, argument in _nodes(tree):
        if str(operator) in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT") and argument[1] - argument[0] > 1:
            yield argument[2]


def _has(tree: Any, name: str) -> bool:
    return any(str(operator) == name for operator, _ in _nodes(tree))


def _nodes(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the (operator, argument) pairs of a parsed expression, at any depth."""
    for operator, argument in tree:
        yield operator, argument
        waiting = [argument]
        while waiting:
            part = waiting.pop()
            if isinstance(part, parser.SubPattern):
                yield from _nodes(part)
            elif isinstance(part, (list, tuple)):
                waiting += part
