"""A few random kills; ``make kills`` does a hundred."""

from __future__ import annotations

import pytest
from conftest import HELPERS


@pytest.mark.slow
def test_nothing_is_lost_and_resumed_runs_are_bit_equal(python):
    code = f"import sys; sys.path.insert(0, {str(HELPERS)!r}); import random_kills\n"
    done = python.copy(code + "result = random_kills.run(5, seed=1)")
    assert done.status == 0, done.err[-3000:]
    assert sum(count["killed"] for count in done.result.values()) >= 5
