"""The catalogue of techniques. Names come from entry points; a module is imported when its technique is first used.

A distribution adds a technique with an entry point in the group ``hf_optim``, whose name is the name of the technique
and whose value is the module. The module implements the hook ``register_techniques``.
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Callable, Iterable
from functools import cache

import pluggy

from ..errors import RecipeError
from ..trust.bounds import first_line, shown
from . import hooks
from .field_checks import did_you_mean, nearest
from .technique import Technique

GROUP = "hf_optim"
log = logging.getLogger(__name__)


class BrokenPackage(RecipeError):
    """The module that an entry point names cannot be imported."""


class Catalogue:
    """Techniques by name, from entry points and from ``register``."""

    def __init__(self) -> None:
        self._manager = pluggy.PluginManager(hooks.PROJECT)
        self._manager.add_hookspecs(hooks)
        self._entry_points = {e.name: e for e in importlib.metadata.entry_points(group=GROUP)}
        self._classes: dict[str, type[Technique]] = {}

    def names(self) -> list[str]:
        """Return the names of all techniques, sorted, without importing any."""
        return sorted({*self._entry_points, *self._classes})

    def names_near(self, name: str) -> str:
        """Return, for an error, the names most like ``name`` and where all are listed."""
        names = self.names()
        near = nearest(name, names)
        return f"{', '.join(near)}{', ...; ' if near else ''}`hf-optim list` shows all {len(names)}"

    def register(self, cls: type[Technique]) -> None:
        """Add a technique class. Raises ``RecipeError`` if another class has its name."""
        known = self._classes.get(cls.spec.name)
        if known is not None and known is not cls:
            raise RecipeError(
                f"rename one of {_full_name(known)} and {_full_name(cls)}: both register the technique "
                f"{cls.spec.name!r}"
            )
        self._classes[cls.spec.name] = cls

    def get(self, name: str) -> type[Technique]:
        """Return the class of a technique; import its module if needed. Raises ``RecipeError`` for an unknown name."""
        if name not in self._classes:
            entry = self._entry_points.get(name)
            if entry is None:
                raise RecipeError(
                    f"no technique {shown(name)}{did_you_mean(name, self.names())} ({self.names_near(name)})"
                )
            self._load(entry)
        return self._classes[name]

    def all(self) -> list[type[Technique]]:
        """Return all technique classes, sorted by family and name. Imports all modules.

        Those of packages that cannot be imported are left out, with a warning for each.
        """
        found = []
        for name in self.names():
            try:
                found.append(self.get(name))
            except BrokenPackage as error:
                log.warning("%s", error)
        return sorted(found, key=lambda c: (c.spec.family, c.spec.name))

    def packages(self, names: Iterable[str]) -> dict[str, str]:
        """Return the packages that bring these techniques, and their versions; none for classes without a package."""
        found = (self._entry_points[name].dist for name in names if name in self._entry_points)
        return {package.name: package.version for package in found if package is not None}

    def _load(self, entry: importlib.metadata.EntryPoint) -> None:
        try:
            module = entry.load()
        except Exception as error:  # the module may be anybody's
            package = f" of the package {entry.dist.name}" if entry.dist is not None else ""
            raise BrokenPackage(
                f"the technique {entry.name!r}{package} cannot be imported from {entry.value}: "
                f"{first_line(error, typed=True)}. Mend, update or uninstall the package"
            ) from error
        if not self._manager.is_registered(module):
            self._manager.register(module, name=module.__name__)
            self._manager.check_pending()
        register_hook = self._manager.subset_hook_caller(
            "register_techniques", [p for p in self._manager.get_plugins() if p is not module]
        )
        found: list[type[Technique]] = []
        register_hook(register=_call_both(found.append, self.register))
        if entry.name not in {cls.spec.name for cls in found}:
            raise RecipeError(
                f"correct the entry point {entry.name!r}: its module {entry.value} registers no technique of that name"
            )


def _call_both(*functions: Callable[[type[Technique]], None]) -> Callable[[type[Technique]], None]:
    def call(cls: type[Technique]) -> None:
        for function in functions:
            function(cls)

    return call


def _full_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


@cache
def catalogue() -> Catalogue:
    """Return the catalogue of this process."""
    return Catalogue()
