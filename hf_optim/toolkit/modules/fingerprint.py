"""Whether a model still computes what was captured of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

# What torch keeps in each module besides its tensors and hooks.
_BOOKKEEPING = frozenset({*vars(nn.Module()), "training"})


def fingerprint(model: nn.Module) -> int:
    """Return a number that changes when a captured forward of the model would no longer compute what the model does.

    It covers the tensors' addresses, dtypes and shapes, the modules' classes and hooks, their settings that are plain
    Python values (an adapter that is switched off, say), and their configurations. Values of weights may change: a
    graph reads them from their address.
    """
    return hash(tuple(_state(model)))


def _state(model: nn.Module) -> Iterator[Any]:
    configs: dict[int, Any] = {}
    for module in model.modules():
        yield type(module)
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
    return id(type(value))
