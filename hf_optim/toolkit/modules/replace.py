"""Modules of a model replaced by others, by name, when the model is built: the base of remote code that stores codes.

This file is stored beside checkpoints, so it imports only torch and transformers.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` where the module `name` of `model` is."""
    parent, _, attribute = name.rpartition(".")
    setattr(model.get_submodule(parent), attribute, module)


def resolve_module_name(model: nn.Module, name: str) -> str | None:
    """The name that a module has in `model`, given its name in that model with, or without, another head.

    None where the model has no such module.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    modules = dict(model.named_modules())
    for candidate in (name, prefix + name, name.removeprefix(prefix)):
        if candidate in modules:
            return candidate
    return None


class ReplacedModules:
    """Part of a model class: the modules that the configuration names are built as others.

    The configuration's field `replaced_field` is `{"modules": {name: entry}, ...}`; a class defines `replacement`.
    """

    replaced_field: str

    def __init__(self, config: Any, *inputs: Any, **kwargs: Any) -> None:
        super().__init__(config, *inputs, **kwargs)  # type: ignore[call-arg]
        said = getattr(config, self.replaced_field, None) or {}
        for name, entry in said.get("modules", {}).items():
            own = resolve_module_name(self, name)  # type: ignore[arg-type]
            if own is not None:
                replace_module(self, own, self.replacement(self.get_submodule(own), entry, said))  # type: ignore

    def replacement(self, module: nn.Module, entry: Any, said: dict[str, Any]) -> nn.Module:
        """The module to stand in the place of `module`; its tensors are then loaded from the checkpoint."""
        raise NotImplementedError

    def _init_weights(self, module: nn.Module) -> None:
        # Some classes (T5) initialize through `linear.weight`, which a module that stores codes need not have.
        try:
            super()._init_weights(module)  # type: ignore[misc]
        except AttributeError as error:
            if "weight" not in str(error):
                raise
