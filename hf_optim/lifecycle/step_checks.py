"""Checking before any work that every step of a recipe can work on a model, whose weights need not be loaded."""

from __future__ import annotations

from typing import Any

from ..compressed.reload_check import require_reloadable
from ..recipes.composition import step_label
from ..recipes.config import OptimConfig
from ..recipes.contract import Reload
from ..toolkit.topology.selection import PatternError


def require_supported_steps(recipe: OptimConfig, model: Any, first: int = 0, *, dense: bool = False) -> int:
    """Check the steps of a recipe from number ``first`` on, up to one that changes the architecture of the model.

    Each step checks what it needs of the model (``Technique.check_model``), and stock transformers must be able to load
    the compressed format that it would write.

    Args:
        recipe: the recipe.
        model: the model as step ``first`` finds it; it may be on the meta device.
        first: the number of the first step to check, from 0.
        dense: the result is written uncompressed, so that its compressed format need not be loadable.

    Returns the number of the step that changes the architecture, else the number of steps: what comes after it can be
    checked once it has run. Raises ``ModelError`` or ``RecipeError``, which names the step.
    """
    for number, step in enumerate(recipe.steps[first:], first):
        label = step_label(number, step)
        try:
            step.check_model(model, label)
        except PatternError as error:
            raise PatternError(f"{label}: {error} in {type(model).__name__}") from error
        if step.changes_architecture():
            return number
        if not dense:
            require_reloadable(step, model, label, own_code=recipe.reload is Reload.REMOTE_CODE)
    return len(recipe.steps)
