"""The control of a recipe that trains: the dense original, trained alike and without the recipe's techniques."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from ...checkpoints.source import load_model, resolve_device
from ...errors import RecipeError
from ...toolkit.checkpoint.placement import NewHeads
from ...training.fit import train_dense
from .job import Job
from .measuring import control_figures

# The value of ``Job.control`` that has a control trained.
TRAIN = "train"
NAME = "the original, trained for this table on the same data, for as many steps, with the same seed and no technique"


def require_trainable_control(job: Job) -> None:
    """Raise ``RecipeError`` if no control can be trained for a job, before any work."""
    stages = [stage for stage in job.recipe.stages if stage.trains]
    if not stages:
        raise RecipeError(
            "--control train: no step of this recipe trains, so the original is the control already; leave it out"
        )
    if job.plan.training_data.dataset == "random":
        raise RecipeError(
            "--control train: random data has no labels, on which a control without the recipe's loss could be "
            "trained; name a dataset (--train DATA)"
        )


def trained_control(job: Job, tokenizer: Any) -> dict[str, Any]:
    """Train a control and return its figures: as many stages as the recipe trains, each with the recipe's arguments.

    Its weights are kept in a temporary folder while it is measured.
    """
    stages = [stage for stage in job.recipe.stages if stage.trains]
    job.print_line(f"training the control: the original, {len(stages)} times as a stage of the recipe trains")
    model = load_model(job.source, NewHeads.ALL)
    if (device := resolve_device(job.device)) is not None:
        model.to(device)
    for _ in stages:
        model = train_dense(model, tokenizer, job.plan.training_data, job.plan.training_arguments)
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "control"
        model.save_pretrained(home)
        if tokenizer is not None:
            tokenizer.save_pretrained(home)
        del model
        figures = control_figures(job, str(home))
    return {**figures, "name": NAME, "trained": True}
