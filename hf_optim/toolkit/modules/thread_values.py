"""A tensor that one module leaves for another within a forward: of each thread its own.

One model may run in several threads, which must not read each other's.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor


class ThreadValue:
    """Holds a tensor from where it is left to where it is taken."""

    def __init__(self) -> None:
        self._by_thread: dict[int, Tensor] = {}

    def leave(self, value: Tensor) -> None:
        """Hold a tensor, in place of one that this thread did not take."""
        self._by_thread[_thread()] = value

    def take(self) -> Tensor | None:
        """Return what this thread left, once; None if there is nothing."""
        return self._by_thread.pop(_thread(), None)

    def is_empty(self) -> bool:
        """Return True if no thread has left anything."""
        return not self._by_thread

    is_bookkeeping = property(is_empty)  # between forwards (``topology.trace_cache``)

    def __getstate__(self) -> dict[str, Any]:
        return {"_by_thread": {}}


def _thread() -> int:
    # What is traced is one forward, whichever threads run the graph.
    return 0 if torch.compiler.is_compiling() else threading.get_ident()
