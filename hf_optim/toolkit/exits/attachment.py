"""Which model has which exits. They are kept beside its modules: its state dict and its parameters are without them."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...errors import ModelError, require_any_model
from .heads import ExitHeads
from .settings import ExitSettings, store_settings
from .structure import find_blocks as find_blocks

ATTRIBUTE = "_hf_optim_exits"


def exits_of(model: Any) -> ExitHeads | None:
    """Return the exits of a model, or None. A copy of a model has a copy of its exits."""
    require_any_model(model)
    found = vars(model).get(ATTRIBUTE)
    if found is None:
        return None
    held = vars(found)["_model"]
    if held is None or held() is not model:
        found.bind(model)
    return found


def require_exits(model: Any) -> ExitHeads:
    """Return the exits of a model. Raises ``ModelError`` if it has none."""
    found = exits_of(model)
    if found is None:
        raise ModelError(
            f"{type(model).__name__} has no exits: load its checkpoint with optim_config='auto', or attach exits first"
        )
    return found


def attach_exits(model: nn.Module, settings: ExitSettings) -> ExitHeads:
    """Give a model exits, in place of those that it may have, and return them.

    Raises ``ModelError`` for a model without blocks, an encoder-decoder, and a block that the model has not.
    """
    made = ExitHeads(model, settings)
    vars(model)[ATTRIBUTE] = made
    return made


def detach_exits(model: nn.Module) -> None:
    """Take its exits from a model, and their entry from its configuration."""
    vars(model).pop(ATTRIBUTE, None)
    store_settings(model.config, None)
