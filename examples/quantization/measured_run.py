"""Time and peak memory of a piece of work in this process; used by our runner and, in their environment, the peers'."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

INTERVAL = 0.01  # seconds between two looks at the memory


def resident_bytes() -> int:
    """Return the resident bytes of this process (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def measured(result: dict[str, Any], device: str) -> Iterator[None]:
    """Add ``seconds``, ``processor_seconds`` (of all threads) and ``peak_bytes`` of the work to ``result``.

    ``peak_bytes`` is what the work held at most beyond what the process had before (the model and the data): resident
    bytes, looked at every 10 ms; on a GPU, bytes allocated there.
    """
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if cuda else resident_bytes()
    highest, stop = [held], threading.Event()

    def watch() -> None:
        while not stop.wait(INTERVAL):
            highest[0] = max(highest[0], resident_bytes())

    watcher = threading.Thread(target=watch, daemon=True)
    if not cuda:
        watcher.start()
    started, used = time.perf_counter(), time.process_time()
    yield
    if cuda:
        torch.cuda.synchronize()
        highest[0] = torch.cuda.max_memory_allocated()
    result["seconds"] = round(time.perf_counter() - started, 2)
    result["processor_seconds"] = round(time.process_time() - used, 2)
    stop.set()
    result["peak_bytes"] = max(highest[0], held if cuda else resident_bytes()) - held
