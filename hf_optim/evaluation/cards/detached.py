"""Calls of other libraries that must not keep the frames of their callers alive."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any


def run_detached(function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, called on a stack of its own.

    A library that keeps exceptions in reference cycles (matplotlib's parser of text does) keeps their frames, the
    frames of all callers, and what these hold, such as the model that is being saved, until the garbage collector runs.
    A thread has no callers.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="hf_optim-card") as pool:
        return pool.submit(function, *args).result()
