"""The sessions of each model: kept from call to call, and dropped when the model has changed."""

from __future__ import annotations

import math
import threading
import weakref
from collections import OrderedDict
from typing import Any

from torch import nn

from ..toolkit.modules.fingerprint import fingerprint
from .session import DecodeSession

# Sessions of one model: each holds a cache on the device.
KEPT = 4
# Sizes of batches; larger ones are multiples of the last.
ROWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
# The smallest cache, and the smallest output of an encoder. Larger ones have a power of two of positions, or one and a
# half of it.
SHORTEST, SHORTEST_ENCODER = 256, 64

# Of each model: the sessions by their size, and for a mode the reason why there is none, each with the fingerprint of
# the model it is for.
_MODELS: weakref.WeakKeyDictionary[nn.Module, OrderedDict[tuple[Any, ...], tuple[int, DecodeSession | str]]] = (
    weakref.WeakKeyDictionary()
)
_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()


def lock(model: nn.Module) -> Any:
    """Return the lock that a call holds while it generates on the sessions of a model."""
    return _LOCKS.setdefault(model, threading.Lock())


def rows_bucket(rows: int) -> int:
    """Return the rows of the session that serves a batch of ``rows``."""
    return next((size for size in ROWS if size >= rows), math.ceil(rows / ROWS[-1]) * ROWS[-1])


def length_bucket(tokens: int, shortest: int = SHORTEST, most: int | None = None) -> int:
    """Return the positions of the session that serves sequences of ``tokens``: ``most`` at most, if they fit."""
    power = max(shortest, 1 << (tokens - 1).bit_length())
    length = 3 * power // 4 if power > shortest and tokens <= 3 * power // 4 else power
    return length if most is None or tokens > most else min(length, most)


def find(model: nn.Module, key: tuple[Any, ...]) -> DecodeSession | str | None:
    """Return what is kept for ``key``: a session or a reason; None if there is none for the model as it is."""
    sessions = _MODELS.get(model)
    if not sessions:
        return None
    now = fingerprint(model)
    for other in [other for other, (made_for, _) in sessions.items() if made_for != now]:
        del sessions[other]  # a captured graph reads the weights that the model had
    if key not in sessions:
        return None
    sessions.move_to_end(key)
    return sessions[key][1]


def keep(model: nn.Module, key: tuple[Any, ...], session: DecodeSession | str) -> None:
    """Keep a session, or the reason why there is none, for the next call; the one used longest ago is dropped."""
    sessions = _MODELS.setdefault(model, OrderedDict())
    sessions[key] = (fingerprint(model), session)
    made = [key for key, (_, each) in sessions.items() if isinstance(each, DecodeSession)]
    for old in made[:-KEPT]:
        del sessions[old]


def drop(model: nn.Module, key: tuple[Any, ...] | None = None) -> None:
    """Drop a session of a model, or all of them, with the memory of their caches and graphs."""
    if key is None:
        _MODELS.pop(model, None)
    elif model in _MODELS:
        _MODELS[model].pop(key, None)
