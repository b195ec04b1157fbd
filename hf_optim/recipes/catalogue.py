"""The catalogue: which techniques exist. Names come from entry points, modules are imported when first asked for.

A distribution adds a technique with an entry point in the group ``hf_optim``: its name is the technique's name, its
value the module. The module implements the hook ``register_techniques``.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from functools import cache

import pluggy

from ..errors import RecipeError
from . import hooks
from .field_checks import did_you_mean
from .technique import Technique

GROUP = "hf_optim"


class Catalogue:
    """Techniques by name, from entry points and from ``register``."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hooks.PROJECT)
        self._manager.add_hookspecs(hooks)
        self._entry_points = {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}
        self._classes: dict[str, type[Technique]] = {}

    def names(self) -> list[str]:
        """Every technique name, sorted, without importing any."""
        return sorted({*self._entry_points, *self._classes})

    def register(self, cls: type[Technique]) -> None:
        """Add a technique class. Raises ``RecipeError`` if its name is taken by another class."""
        known = self._classes.get(cls.spec.name)
        if known is not None and known is not cls:
            raise RecipeError(f"two classes claim the technique {cls.spec.name!r}: {_home(known)} and {_home(cls)}")
        self._classes[cls.spec.name] = cls

    def get(self, name: str) -> type[Technique]:
        """The class of a technique, importing its module. Raises ``RecipeError`` for an unknown name."""
        if name not in self._classes:
            entry = self._entry_points.get(name)
            if entry is None:
                raise RecipeError(
                    f"no technique {name!r}{did_you_mean(name, self.names())} (there are {', '.join(self.names())})"
                )
            self._load(entry)
        return self._classes[name]

    def all(self) -> list[type[Technique]]:
        """Every technique class, sorted by family and name; imports all modules."""
        return sorted((self.get(name) for name in self.names()), key=lambda c: (c.spec.family, c.spec.name))

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        module = entry.load()
        if not self._manager.is_registered(module):
            self._manager.register(module, name=module.__name__)
            self._manager.check_pending()
        hooks = self._manager.subset_hook_caller(
            "register_techniques", [p for p in self._manager.get_plugins() if p is not module]
        )
        found: list[type[Technique]] = []
        hooks(register=_both(found.append, self.register))
        if entry.name not in {cls.spec.name for cls in found}:
            raise RecipeError(f"{entry.value} is announced as technique {entry.name!r} but does not register it")


def _both(*functions: Callable[[type[Technique]], None]) -> Callable[[type[Technique]], None]:
    def call(cls: type[Technique]) -> None:
        for function in functions:
            function(cls)

    return call


def _home(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def catalogue() -> Catalogue:
    """The one catalogue of this process."""
    return Catalogue()
