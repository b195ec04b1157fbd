"""Recent traces by the structure of their models: one structure is traced once, however often a run asks for it.

What a fake forward does follows from classes, shapes, dtypes and settings, not from weights (``fake_model``). The
structure of a model is all of this, attribute by attribute. A model that has an attribute whose whole content is not
compared here has no structure, and is traced each time. A class of ours says of its objects that no forward depends on
them (``is_bookkeeping``), or that their attributes are all that one depends on (``compares_attributes``).
"""

from __future__ import annotations

import enum
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedConfig

from ..distributed.tensor_parts import kept_hooks

KEPT = 16
"""Number of results that a cache keeps by default."""

BY_VALUE = frozenset(
    {type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.layout, torch.Size}
)
"""Types whose objects cannot change."""
WITHOUT_EFFECT = frozenset({"_name_or_path", "name_or_path", "_commit_hash", "_weight_conversions", "forward"})
"""Attributes that no forward reads, and the one that a fake copy leaves out."""


class NoStructureError(Exception):
    """Something in a model has a content that cannot be compared."""


def structure(model: nn.Module, inputs: Mapping[str, Any], args: tuple[Any, ...]) -> Hashable | None:
    """Return what a fake forward of ``model(*args, **inputs)`` depends on; None if that cannot be told."""
    try:
        found = _Structure()
        content = found.of(model), found.of(dict(inputs)), found.of(args)
    except NoStructureError:
        return None
    return content, torch.get_default_dtype(), torch.get_default_device(), torch.is_autocast_enabled("cpu")


class StructureCache:
    """The last ``kept`` results by structure. A result must not refer to the model that it was computed for."""

    def __init__(self, kept: int = KEPT) -> None:
        self.kept = kept
        self._results: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Hashable | None, compute: Callable[[], Any]) -> Any:
        """Return the result of a structure, computed if it is not known."""
        with self._lock:
            if key is not None and key in self._results:
                self._results.move_to_end(key)
                return self._results[key]
        result = compute()
        if key is not None:
            with self._lock:
                self._results[key] = result
                while len(self._results) > self.kept:
                    self._results.popitem(last=False)
        return result

    def clear(self) -> None:
        """Forget all results."""
        with self._lock:
            self._results.clear()


class _Structure:
    """Turns a model into nested tuples; what occurs twice is there once, then by its number."""

    def __init__(self) -> None:
        self._numbers: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is that of one object while the object lives

    def of(self, value: Any) -> Hashable:
        if type(value) in (dict, OrderedDict):
            return type(value), tuple((self._fixed(key), self.of(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value), tuple(map(self.of, value))
        if type(value) in (set, frozenset):
            return type(value), frozenset(map(self._fixed, value))
        if isinstance(value, types.MethodType) and isinstance(value.__self__, nn.Module):
            return value.__func__, self.of(value.__self__)
        if isinstance(value, Tensor):
            return self._once(value) or (isinstance(value, nn.Parameter), value.shape, value.dtype)
        if isinstance(value, nn.Module):
            return self._once(value) or (type(value), type(value).forward, self._attributes(value))
        if isinstance(value, PreTrainedConfig) or type(value) is GenerationConfig:
            return self._once(value) or (type(value), self._attributes(value))
        if hasattr(type(value), "__pydantic_fields__"):  # the schemes of compressed-tensors
            return type(value), self.of(vars(value))
        if getattr(type(value), "is_bookkeeping", False) and value.is_bookkeeping:  # or a property
            return (type(value),)
        return self._fixed(value)

    def _once(self, value: Any) -> Hashable:
        if id(value) in self._numbers:
            return "again", self._numbers[id(value)]
        self._numbers[id(value)] = len(self._numbers)
        self._alive.append(value)
        return None

    def _attributes(self, holder: Any) -> Hashable:
        found = []
        for name, value in vars(holder).items():
            if isinstance(value, dict) and name.startswith("_") and "_hooks" in name:
                if not name.endswith("_with_kwargs") and kept_hooks(name, value):
                    raise NoStructureError(name)
            elif name not in WITHOUT_EFFECT:
                found.append((name, self.of(value)))
        return tuple(found)

    @staticmethod
    def _fixed(value: Any) -> Hashable:
        if type(value) in BY_VALUE or isinstance(value, (type, enum.Enum)) or _is_stateless(value):
            return type(value), value  # 1, 1.0 and True are equal
        if type(value) is tuple:
            return tuple(map(_Structure._fixed, value))
        if _is_plain(value):
            return type(value), tuple((name, _Structure._fixed(item)) for name, item in vars(value).items())
        raise NoStructureError(type(value).__name__)


def _is_plain(value: Any) -> bool:
    """Return True for a frozen dataclass, and for a class that says that a forward reads its attributes alone."""
    settled = getattr(getattr(type(value), "__dataclass_params__", None), "frozen", False)
    return hasattr(value, "__dict__") and (settled or getattr(type(value), "compares_attributes", False))


def _is_stateless(value: Any) -> bool:
    if isinstance(value, types.FunctionType):
        return value.__closure__ is None
    return isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, (types.ModuleType, type(None)))
