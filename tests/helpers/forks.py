"""Copies of a process for tests."""

from __future__ import annotations

import os
import sys
import threading


def fork() -> int:
    """Fork the process, with a lock of its own for the progress bars of the copy; return what ``os.fork`` does.

    tqdm's lock is shared between forks: a copy that is killed while it holds it would stop all others.
    """
    child = os.fork()
    if child == 0 and (bars := sys.modules.get("tqdm.std")) is not None:
        bars.tqdm.set_lock(threading.RLock())
    return child
