"""Values from files of others in messages: short, printable, and safe to build."""

from __future__ import annotations

import reprlib
from typing import Any

MAX_SHOWN = 120


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
