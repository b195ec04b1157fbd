"""Calibration drivers: how batches reach the observers that the steps of a stage attach.

``whole_model`` runs the model as it is. ``blockwise`` works on one transformer block at a time: that block alone is on
the accelerator, activations wait on the CPU, and what a block computes after it was changed is what the next block
is calibrated on. A driver decides how batches flow and nothing else; the steps are the same under each.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from tqdm.auto import tqdm

from ..errors import ModelError
from ..recipes.composition import Stage
from ..recipes.technique import Technique
from ..runs.run import Run
from ..runs.scope import Scope
from ..toolkit import topology
from ..toolkit.modules.modes import evaluating
from .blockwise import BlockwiseDriver, Journal
from .forward import device_of, to_device, without_cache
from .steps import batches_for, require_covered, run_calibration
from .throughput import summarize_throughput


def calibrate(run: Run, stage: Stage, journal: Journal | None = None) -> dict[str, Any]:
    """Run the calibrating steps of a stage. Returns the ``driver`` that was used and its figures (see ``summarize_throughput``).

    Raises ``ModelError`` when a step finds nothing to work on and ``NumericalError`` for non-finite activations, both
    naming the step. Every observer is detached and every module restored when anything raises.
    """
    steps = [step for step in stage.steps if step.implements("calibrate")]
    blocks = topology.blocks(run.model) if run.recipe.driver != "whole_model" else []
    figures: dict[str, Any] = {}
    if run.recipe.driver == "blockwise" and not blocks:
        raise ModelError(f"driver blockwise: no sequence of blocks was found in {type(run.model).__name__}")
    with evaluating(run.model), without_cache(run.model):
        for whole, group in groupby(steps, key=lambda step: not blocks or step.needs_whole_model()):
            if whole:
                _whole_model(run, list(group))
            else:
                # Asked again: a step before may have taken blocks out.
                driver = BlockwiseDriver(run, list(group), topology.blocks(run.model), journal)
                driver.drive()
                figures |= summarize_throughput(run, driver.seconds, driver.passes, driver.device)
    for step in steps:
        require_covered(run, step)
    return {"driver": "blockwise" if blocks else "whole_model", **figures}


def _whole_model(run: Run, steps: Sequence[Technique]) -> None:
    for step in steps:
        if step.needs_teacher():
            raise ModelError(
                f"{run.label(step)} works block by block, towards what each block computed before: use driver: "
                f"blockwise, with a model that has a sequence of blocks ({type(run.model).__name__})"
            )
    device = device_of(run.model)

    def feed(step: Technique) -> None:
        batches = batches_for(run, step)
        for batch in tqdm(batches, desc=f"calibrating: {step.name}", unit="batch", leave=False, disable=not batches):
            run.model(**to_device(batch, device))

    for step in steps:  # a scope for each: a step may take layers out
        run_calibration(run, step, Scope("", run.model, run.model), feed)
