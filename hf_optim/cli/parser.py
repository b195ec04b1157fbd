"""The argument parser of ``hf-optim``: wrong arguments are one line, with the nearest right one."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

_CHOICE = re.compile(r"invalid choice: '(?P<given>.*?)' \(choose from (?P<known>.*)\)$", re.DOTALL)


class CommandParser(argparse.ArgumentParser):
    """A parser that refuses what it does not know itself, so that the message names the command."""

    def parse_known_args(  # type: ignore[override]  # argparse declares overloads for types of namespaces
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse as ``ArgumentParser`` does, but leave nothing over."""
        namespace, left = super().parse_known_args(args, namespace)
        if left:
            options = [name for name in self._option_string_actions if name.startswith("--")]
            unknown = [each.partition("=")[0] for each in left if each.startswith("-")]
            self.error(f"unrecognized arguments: {' '.join(left)}{_nearest(unknown, options)}")
        return namespace, []

    def error(self, message: str) -> NoReturn:
        """Print one line, without the usage, which is longer than a screen for some commands; exit with status 2."""
        from ..errors import MAX_MESSAGE, printable

        if found := _CHOICE.search(message):
            message += _nearest([found["given"]], re.findall(r"[\w.:-]+", found["known"]))
        print(f"{self.prog}: {printable(message, MAX_MESSAGE)} (see `{self.prog} --help`)", file=sys.stderr)
        sys.exit(2)


def _nearest(given: Iterable[str], known: Sequence[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the first of ``given`` that is like one of ``known``, else ""."""
    from ..recipes.field_checks import did_you_mean

    return next((hint for each in given if (hint := did_you_mean(each, known))), "")
