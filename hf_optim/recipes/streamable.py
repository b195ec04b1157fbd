"""Which recipes the streamed driver supports."""

from __future__ import annotations

from ..errors import RecipeError
from .composition import step_label
from .config import OptimConfig
from .contract import Reload

REMEDY = "use driver: blockwise, which needs memory for the whole model"


def require_streamable(recipe: OptimConfig, dense: bool = False) -> None:
    """Raise ``RecipeError`` if the recipe needs more of the model in memory than one block at a time.

    ``dense``: the result is to be written as a dense checkpoint.
    """
    for index, step in enumerate(recipe.steps):
        label = step_label(index, step)
        if step.spec.trains:
            raise RecipeError(f"{REMEDY}: {label} trains, but the streamed driver holds one block at a time")
        if step.implements("transform_model"):
            raise RecipeError(
                f"{REMEDY}: {label} changes the architecture with all weights in memory, but the streamed driver holds "
                "one block at a time"
            )
        if step.implements("calibrate") and step.needs_whole_model():
            raise RecipeError(
                f"{REMEDY}: {label} compares all blocks with each other, but the streamed driver holds one block at a "
                "time"
            )
        if step.reload() == Reload.REMOTE_CODE:
            raise RecipeError(
                f"{REMEDY}: {label} writes a model of another class, which the streamed driver cannot write block by "
                "block"
            )
    if len(recipe.stages) > 1:
        raise RecipeError(f"{REMEDY}: the recipe has {len(recipe.stages)} stages, but the streamed driver runs one")
    if dense:
        raise RecipeError(f"{REMEDY}: the streamed driver writes compressed checkpoints, not their dense equivalent")
