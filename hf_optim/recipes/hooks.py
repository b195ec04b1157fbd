"""The markers of pluggy, and the hook through which modules register techniques."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from .technique import Technique

PROJECT = "hf_optim"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def register_techniques(register: Callable[[type[Technique]], None]) -> None:
    """Register technique classes. Called on a module when the catalogue loads it.

    Call ``register(cls)`` once for each class decorated with ``@technique``.
    """
