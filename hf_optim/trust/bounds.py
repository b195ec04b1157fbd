"""Values from files of others in messages: short, printable, and safe to build."""

from __future__ import annotations

import reprlib
from typing import Any

from ..errors import printable

MAX_SHOWN = 120
MAX_LINE = 300
# Errors whose message alone says little: `'weight'`, `list index out of range`.
_NAMED = (LookupError, AttributeError, TypeError, ArithmeticError, AssertionError, NotImplementedError, EOFError)


class _Bounded(reprlib.Repr):
    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 6
        self.maxstring, self.maxother, self.maxlong = 80, 80, 40

    def repr_int(self, x: int, level: int) -> str:
        return repr(x) if x.bit_length() < 200 else f"a number of {x.bit_length()} bits"

    def repr_bool(self, x: bool, level: int) -> str:
        return repr(x)


_BOUNDED = _Bounded()


def shown(value: Any) -> str:
    """Return ``repr(value)`` for a message, at most 120 characters, whatever the value is."""
    try:
        text = _BOUNDED.repr(value)
    except Exception:  # the repr of an object of a caller may raise anything
        text = f"a {type(value).__name__}"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def first_line(error: BaseException, limit: int = MAX_LINE, typed: bool = False) -> str:
    """Return what an error of another library says, for a message: its first line that is not empty.

    It is shortened to ``limit`` characters, and begins with the type of the error if the message alone says little, or
    if ``typed``.
    """
    if isinstance(error, RecursionError) and not typed:
        return "it is nested too deeply"
    try:
        lines = [line for line in str(error)[: 10 * limit].splitlines() if line.strip()]
    except Exception:  # the text of an error of a caller may raise anything
        lines = []
    # "Validation error for 'x':" says what went wrong only on its next line.
    joined = " ".join(line.strip() for line in (lines[:2] if lines and lines[0].rstrip().endswith(":") else lines[:1]))
    line = printable(joined, limit)
    if not line:
        return type(error).__name__
    return f"{type(error).__name__}: {line}" if typed or isinstance(error, _NAMED) else line
