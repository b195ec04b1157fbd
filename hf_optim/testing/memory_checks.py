"""Checks of memory: what a deleted model leaves behind, and what a run holds."""

from __future__ import annotations

import gc
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..toolkit.modules.graph_capture import uncollected

NOT_HELD = (type, types.ModuleType, types.CodeType, types.BuiltinFunctionType)
"""Objects that live as long as the process."""


def kept_after_deletion(make: Callable[[], nn.Module]) -> list[str]:
    """Return what is left of the model that ``make`` returns when it is deleted, without the garbage collector.

    The names of parameters and buffers that still exist are returned, and ``"the model"``; empty if all are freed.
    """
    with _without_collector():
        model = make()
        found: dict[str, Any] = {"the model": weakref.ref(model)}
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            found[name] = weakref.ref(tensor)
        del model, tensor
        return [name for name, reference in found.items() if reference() is not None]


@contextmanager
def _without_collector() -> Iterator[None]:
    gc.collect()
    with uncollected():
        yield


def held_tensors(root: Any) -> list[torch.Tensor]:
    """Return the tensors that are kept alive by an object, at any depth."""
    seen: dict[int, Any] = {id(root): root}
    pending, found = [root], []
    while pending:
        current = pending.pop()
        if isinstance(current, torch.Tensor):
            found.append(current)
        for held in _references(current):
            if id(held) not in seen and not isinstance(held, NOT_HELD):
                seen[id(held)] = held
                pending.append(held)
    return found


def _references(thing: Any) -> list[Any]:
    if isinstance(thing, types.FunctionType):  # without its globals
        return [thing.__closure__, thing.__defaults__, thing.__kwdefaults__, thing.__dict__]
    return gc.get_referents(thing)
