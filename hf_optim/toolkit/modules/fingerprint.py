"""Fingerprints of models: a captured forward holds as long as the one of its model stays the same."""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What torch keeps in each module besides its tensors and hooks.
_BOOKKEEPING = frozenset(vars(nn.Module())) - {"training"}


def fingerprint(model: nn.Module) -> int:
    """Return a number that changes when a captured forward of the model would no longer compute what the model does.

    It covers the tensors' addresses, dtypes and shapes, the modules' classes, forwards and hooks, their modes, their
    settings that are plain Python values (an adapter that is switched off, say) or functions, and their configurations.
    Values of weights may change: a
    graph reads them from their address.
    """
    return hash(tuple(_state(model)))


def _state(model: nn.Module) -> Iterator[Any]:
    configs: dict[int, Any] = {}
    for module in model.modules():
        yield type(module)
        yield id(type(module).forward)
        for name, value in vars(module).items():
            if name in ("_parameters", "_buffers"):
                yield from ((key, t.data_ptr(), t.dtype, t.shape) for key, t in value.items() if t is not None)
            elif name in ("_forward_hooks", "_forward_pre_hooks"):
                yield tuple(value)
            elif name == "config":
                configs[id(value)] = value
            elif name not in _BOOKKEEPING:
                yield _plain(value)
    for config in configs.values():
        yield _plain(getattr(config, "__dict__", None))


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype)):
        return value
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(_plain(each) for each in value)
    if isinstance(value, dict):
        return tuple((str(key), _plain(each)) for key, each in value.items())
    if isinstance(value, torch.Tensor):
        return value.data_ptr(), value.dtype, value.shape
    if isinstance(value, (types.FunctionType, types.BuiltinFunctionType)):
        return id(value)
    if isinstance(value, types.MethodType):
        return id(value.__func__), id(value.__self__)
    if isinstance(value, functools.partial):
        return _plain(value.func), _plain(value.args), _plain(value.keywords)
    return id(type(value))
