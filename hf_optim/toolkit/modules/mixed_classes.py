"""Classes of modules with a mixin, made when they are needed.

This file is stored beside checkpoints, so it imports only the standard library.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any


@lru_cache(maxsize=256)
def mixed(mixin: type, stock: type) -> type:
    """Return a subclass of ``stock`` with its name, whose objects can be copied and pickled."""
    if issubclass(stock, mixin):
        return stock

    def reduced(self: Any, protocol: int) -> Any:
        return remade, (mixin, stock), self.__dict__

    return type(stock.__name__, (mixin, stock), {"__reduce_ex__": reduced, "__module__": stock.__module__})


def remade(mixin: type, stock: type) -> Any:
    """Return an object of a class that ``mixed`` makes, without its state."""
    made = mixed(mixin, stock)
    return made.__new__(made)  # type: ignore[call-overload]
