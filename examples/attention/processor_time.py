"""Processor time of calls: other work on the machine does not count."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def shortest_time(call: Callable[[], Any], seconds: float) -> float:
    """Return the shortest processor time of a call in milliseconds, of calls for about ``seconds``."""
    call()
    found: list[float] = []
    while not found or (sum(found) < seconds and len(found) < 20):
        start = time.process_time()
        call()
        found.append(time.process_time() - start)
    return min(found) * 1e3
