"""The one seam to transformers: ``PreTrainedModel.from_pretrained`` accepts ``optim_config``.

transformers imports its modelling code (and torch with it) lazily, and importing hf_optim must not change that: if
the module is not loaded yet, the wrapper waits for its import.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from types import ModuleType
from typing import Any

MODULE = "transformers.modeling_utils"
_MARK = "_hf_optim_original"


def install() -> None:
    """Wrap ``PreTrainedModel.from_pretrained``, now or when transformers loads it. Doing it twice changes nothing."""
    module = sys.modules.get(MODULE)
    if module is not None and hasattr(module, "PreTrainedModel"):
        _wrap(module)
    elif not any(isinstance(finder, _Waiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiter())


def uninstall() -> None:
    """Undo ``install``: transformers is as if hf_optim had never been imported."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Waiter)]
    module = sys.modules.get(MODULE)
    wrapper = module and module.PreTrainedModel.__dict__.get("from_pretrained")
    original = getattr(getattr(wrapper, "__func__", None), _MARK, None)
    if module is not None and original is not None:
        module.PreTrainedModel.from_pretrained = original


def _wrap(module: ModuleType) -> None:
    original = module.PreTrainedModel.__dict__["from_pretrained"]
    if hasattr(original.__func__, _MARK):
        return

    @functools.wraps(original.__func__)
    def from_pretrained(cls: Any, *args: Any, optim_config: Any = None, **kwargs: Any) -> Any:
        if kwargs.get("quantization_config") is not None:
            from .quantization_argument import take_recipe

            optim_config = take_recipe(kwargs, optim_config)
        if optim_config is None:
            return original.__get__(None, cls)(*args, **kwargs)
        from .loading import load

        return load(cls, original.__get__(None, cls), args, kwargs, optim_config)

    setattr(from_pretrained, _MARK, original)
    module.PreTrainedModel.from_pretrained = classmethod(from_pretrained)


class _Waiter(importlib.abc.MetaPathFinder):
    """Lets the ordinary finders find the module, and wraps the class once the module has run."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                _wrap(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
