"""Fake copies of a module: the same classes and names, other tensors (usually fake ones), no hooks.

A copy shares nothing that a forward could change: parameters, buffers and plain tensor attributes are replaced,
containers and configs are copied, hooks are left out, and so is a ``forward`` bound to one instance. Running the copy
therefore never changes the original. Only the hooks of a layer that is a part of one are kept: its shapes need them.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ..distributed.tensor_parts import kept_hooks

Convert = Callable[[Tensor], Tensor]


def empty_on_cpu(tensor: Tensor) -> Tensor:
    """Return an uninitialised CPU tensor of the same shape; every floating dtype becomes float32.

    Inside a ``FakeTensorMode`` it is a fake tensor, which needs no memory.
    """
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="cpu")


def copy_with_tensors(module: nn.Module, convert: Convert, settings: dict[str, Any] | None = None) -> nn.Module:
    """Copy a module in evaluation mode, with ``convert(tensor)`` in place of each tensor.

    Sharing is kept: modules, tensors and configs that appear twice in the original appear twice in the copy.
    ``settings`` are attributes to set on each copied config of transformers that has them.
    """
    return _Copier(convert, settings or {}).module(module).eval()


class _Copier:
    """Copies a module tree once; ``memo`` maps the id of an original to its copy."""

    def __init__(self, convert: Convert, settings: dict[str, Any]) -> None:
        self.convert = convert
        self.settings = settings
        self.memo: dict[int, Any] = {}
        self.config_memo: dict[int, Any] = {}

    def module(self, original: nn.Module) -> nn.Module:
        if id(original) in self.memo:
            return self.memo[id(original)]
        copied = nn.Module.__new__(type(original))
        self.memo[id(original)] = copied
        copied.__dict__.update({name: self.attribute(name, value) for name, value in vars(original).items()})
        copied.__dict__.pop("forward", None)
        return copied

    def attribute(self, name: str, value: Any) -> Any:
        hooks = isinstance(value, dict) and name.startswith("_") and "_hooks" in name
        return OrderedDict(kept_hooks(name, value)) if hooks else self.value(value)

    def value(self, value: Any) -> Any:
        if isinstance(value, nn.Module):
            return self.module(value)
        if isinstance(value, Tensor):
            return self.tensor(value)
        if isinstance(value, PreTrainedConfig):
            return self.config(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.module(value.__self__))
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self.value(item)) for key, item in value.items())
        if type(value) in (list, tuple, set):
            return type(value)(self.value(item) for item in value)
        return value

    def tensor(self, original: Tensor) -> Tensor:
        if id(original) not in self.memo:
            copied = self.convert(original)
            if isinstance(original, nn.Parameter) and not isinstance(copied, nn.Parameter):
                copied = nn.Parameter(copied, requires_grad=False)
            self.memo[id(original)] = copied
        return self.memo[id(original)]

    def config(self, original: PreTrainedConfig) -> PreTrainedConfig:
        copied = copy.deepcopy(original, self.config_memo)
        for name, value in self.settings.items():
            if hasattr(copied, name):
                setattr(copied, name, value)
        return copied
