"""The entry ``hf_optim`` of transformers' registry of experts functions, which exists while a model uses it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

NAME = "hf_optim"

_functions: list[Callable[..., Any]] = []
_users: weakref.WeakSet[Any] = weakref.WeakSet()


def provide(function: Callable[..., Any]) -> None:
    """Set the function that is registered."""
    _functions[:] = [function]


def use(module: Any) -> None:
    """Keep the function registered while ``module`` (a module, or what a model holds) exists, or until ``drop``."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, _functions[0])
    if module not in _users:
        _users.add(module)
        weakref.finalize(module, _remove_unused)


def drop(module: Any) -> None:
    """Undo ``use``."""
    _users.discard(module)
    _remove_unused()


def _remove_unused() -> None:
    if not any(True for _ in _users):  # iteration leaves out modules that no longer exist
        ALL_EXPERTS_FUNCTIONS._global_mapping.pop(NAME, None)
