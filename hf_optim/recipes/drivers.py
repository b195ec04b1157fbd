"""Which recipes the streamed driver can run."""

from __future__ import annotations

from ..errors import RecipeError
from .config import OptimConfig
from .contract import Reload

REMEDY = "use driver: blockwise, on a machine with room for the model"


def refuse_streamed(recipe: OptimConfig, dense: bool = False) -> None:
    """Raise ``RecipeError`` for a recipe that needs more of a model than one block at a time."""
    for position, step in enumerate(recipe.steps):
        label = f"step {position + 1} ({step.name})"
        if step.spec.trains:
            raise RecipeError(f"{label} trains, and the streamed driver has one block in memory at a time; {REMEDY}")
        if step.implements("transform_model"):
            raise RecipeError(
                f"{label} changes the architecture with all weights in memory, and the streamed driver has one block "
                f"at a time; {REMEDY}"
            )
        if step.implements("calibrate") and step.needs_whole_model():
            raise RecipeError(
                f"{label} compares all blocks with each other, and the streamed driver has one in memory at a time; "
                f"{REMEDY}"
            )
        if step.reload() == Reload.REMOTE_CODE:
            raise RecipeError(
                f"{label} writes a model of another class, which the streamed driver does not write block by block; "
                f"{REMEDY}"
            )
    if len(recipe.stages) > 1:
        raise RecipeError(f"the recipe has {len(recipe.stages)} stages, and the streamed driver does one; {REMEDY}")
    if dense:
        raise RecipeError(f"the streamed driver writes compressed checkpoints, not their dense equivalent; {REMEDY}")
