"""Replace modules of a model by name when the model is built: the base of remote code that stores codes.

This file is stored with checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module ``name`` of ``model`` by ``module``."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def find_submodule(model: nn.Module, name: str) -> nn.Module | None:
    """Return the module of a name, or None if the model has none."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def names_in(model: nn.Module, name: str) -> tuple[str, str, str]:
    """Return the names that a module may have in a model, given that in it or with another head or without one."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return name, prefix + name, name.removeprefix(prefix)


def resolve_module_name(model: nn.Module, name: str) -> str | None:
    """Return the name of a module in ``model``, given its name in that model with another head or without a head.

    Returns None if the model has no such module.
    """
    modules = dict(model.named_modules())
    return next((each for each in names_in(model, name) if each in modules), None)


class ByEitherName:
    """The modules that a model has now, by their names in it or in the same model with another head or without one."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.modules = model, dict(model.named_modules())

    def __getitem__(self, name: str) -> nn.Module | None:
        names = names_in(self.model, name)
        return next((self.modules[each] for each in names if each in self.modules), None)


class ReplacedModules:
    """Mixin of a model class that replaces the modules listed in the configuration.

    The configuration's field ``replaced_field`` is ``{"modules": {name: entry}, ...}``; a subclass defines
    ``replacement``.
    """

    replaced_field: str

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        settings = getattr(config, self.replaced_field, None) or {}
        for name, entry in settings.get("modules", {}).items():
            own = resolve_module_name(self, name)  # type: ignore[arg-type]
            if own is not None:
                replace_module(self, own, self.replacement(self.get_submodule(own), entry, settings))  # type: ignore

    def replacement(self, module: nn.Module, entry: Any, field: dict[str, Any]) -> nn.Module:
        """Return the module that replaces ``module``; its tensors are then loaded from the checkpoint.

        Args:
            module: the module of the stock model.
            entry: its entry in the configuration.
            field: the whole field of the configuration.
        """
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # Some classes (T5) initialize through `linear.weight`, which a module that stores codes need not have.
        try:
            super()._init_weights(module)  # type: ignore[misc]
        except AttributeError as error:
            if "weight" not in str(error):
                raise
