"""Checking before any work that every step of a recipe can work on a model, whose weights need not be loaded."""

from __future__ import annotations

from typing import Any

from ..compressed.reload_check import require_reloadable
from ..errors import ModelError
from ..recipes.composition import step_label
from ..recipes.config import OptimConfig
from ..recipes.contract import Reload
from ..recipes.technique import Technique
from ..toolkit.topology.selection import PatternError
from ..trust.code import is_stock


def require_supported_steps(recipe: OptimConfig, model: Any, first: int = 0, *, dense: bool = False) -> int:
    """Check the steps of a recipe from number ``first`` on, as far as it is known what model they will find.

    Each step checks what it needs of the model (``Technique.check_model``), and stock transformers must be able to load
    the compressed format that it would write.

    Args:
        recipe: the recipe.
        model: the model as step ``first`` finds it; it may be on the meta device.
        first: the number of the first step to check, from 0.
        dense: the result is written uncompressed, so that its compressed format need not be loadable.

    Returns the number of the first step that changes the architecture, else the number of steps: what comes after it is
    checked again once it has run. Raises ``ModelError`` or ``RecipeError``, which names the step.
    """
    changed = None
    for number, step in enumerate(recipe.steps[first:], first):
        label = step_label(number, step)
        _require_no_other_code(step, model, label)
        try:
            step.check_model(model, label)
        except PatternError as error:
            raise PatternError(f"{label}: {error} in {type(model).__name__}") from error
        if step.changes_architecture():
            changed = number if changed is None else changed
            model = step.model_after(model, label)
            if model is None:
                break
            continue
        if not dense:
            require_reloadable(step, model, label, own_code=recipe.reload is Reload.REMOTE_CODE)
    return len(recipe.steps) if changed is None else changed


def _require_no_other_code(step: Technique, model: Any, label: str) -> None:
    """Raise ``ModelError`` if a step brings code for a model that has some already."""
    code = getattr(step, "remote_code", None)
    if code is None or step.reload() is not Reload.REMOTE_CODE:
        return
    if code.takes_over and model.config.model_type.startswith(f"{code.takes_over}_"):
        return
    if not is_stock(model):
        raise ModelError(
            f"{label}: {type(model).__name__} has code of its own, and {step.name} brings code of its own: a "
            "checkpoint can have one of them. Use the technique on a model of a class of transformers"
        )
