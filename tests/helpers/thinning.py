"""A third of many like cases in ``make test``, all of them in ``make test-models``."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def thinned(cases: Iterable[Any], every: int = 3) -> list[Any]:
    """Return cases for ``pytest.mark.parametrize``, with the marker ``slow`` on all but each ``every``-th."""
    made = []
    for number, case in enumerate(cases):
        values = case if isinstance(case, tuple) else (case,)
        made.append(pytest.param(*values, marks=[pytest.mark.slow] if number % every else []))
    return made
