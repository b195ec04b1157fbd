"""Calibration drivers: run calibration batches through a model while the steps of a stage observe and modify it.

``whole_model`` runs the model as it is. ``blockwise`` works on one transformer block at a time: only that block is on
the accelerator, activations stay on the CPU, and each block is calibrated on the outputs of the blocks already
modified. A driver decides only how batches run through the model; the steps are the same under every driver.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..errors import ModelError
from ..recipes.composition import Stage
from ..recipes.technique import Technique
from ..runs.progress import stage as showing
from ..runs.run import Run
from ..runs.scope import Scope
from ..toolkit import topology
from ..toolkit.modules.modes import device_of, eval_mode
from ..toolkit.statistics import BatchRows
from .blockwise import BlockwiseDriver, Journal
from .forward import forward_errors, to_device, without_cache
from .steps import any_needs_data, batches_for, labels_for, name_of_work, require_covered, run_calibration
from .throughput import summarize_throughput

log = logging.getLogger(__name__)


def calibrate(run: Run, stage: Stage, journal: Journal | None = None) -> dict[str, Any]:
    """Run the calibrating steps of a stage.

    Returns the ``driver`` that was used, and the metrics of ``summarize_throughput``. Raises ``ModelError`` if a step
    has no layer to change and ``NumericalError`` for non-finite activations; both name the step. On any error, every
    observer is detached and every module restored.
    """
    steps = [step for step in stage.steps if step.implements("calibrate")]
    driver_name = run.recipe.driver
    if driver_name == "blockwise":
        blocks = topology.require_blocks(run.model, driver_name)
    else:
        blocks = topology.blocks(run.model) if driver_name != "whole_model" else []
    metrics: dict[str, Any] = {}
    if blocks and any_needs_data(steps) and (reason := topology.exchanged_state(run.model)):
        if run.recipe.driver == "blockwise":
            raise ModelError(f"driver blockwise: {reason}, so blocks cannot run alone; use driver: whole_model")
        log.info("the driver is whole_model, since %s", reason)
        blocks = []
    with eval_mode(run.model), without_cache(run.model):
        for whole, group in groupby(steps, key=lambda step: not blocks or step.needs_whole_model()):
            if whole:
                _calibrate_whole_model(run, list(group))
            else:
                # Recomputed, since an earlier step may have removed blocks.
                driver = BlockwiseDriver(run, list(group), topology.blocks(run.model), journal)
                driver.calibrate()
                metrics |= summarize_throughput(run, driver.seconds, driver.passes, driver.device)
    for step in steps:
        require_covered(run, step)
    return {"driver": "blockwise" if blocks else "whole_model", **metrics}


def _calibrate_whole_model(run: Run, steps: Sequence[Technique]) -> None:
    for step in steps:
        if step.needs_teacher():
            raise ModelError(
                f"{run.label(step)} trains each block towards its original outputs: use driver: blockwise, with a "
                f"model that has a sequence of blocks (here: {type(run.model).__name__})"
            )
    device = device_of(run.model)

    def run_batches(step: Technique) -> None:
        batches = batches_for(run, step)
        if not batches:
            return
        rows = BatchRows(run.model)
        with showing("running calibration data", len(batches), "batches") as shown:
            for number, batch in enumerate(shown.over(batches)):
                with rows.of(batch, labels_for(run, number)), forward_errors(run.model, batch):
                    run.model(**to_device(batch, device))

    for step in steps:  # a new scope for each: a step may remove layers
        with showing(f"{name_of_work([step])} ({step.name})"):
            run_calibration(run, step, Scope("", run.model, run.model), run_batches)
