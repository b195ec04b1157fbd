"""The stages of a run, in order: transform, calibrate, (train), finalize."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pluggy
from transformers import PreTrainedConfig, PreTrainedModel

from .. import hookspecs
from ..calibration import drivers
from ..checkpoints import saving
from ..checkpoints.source import find_processor
from ..errors import DataError
from ..recipes import hooks
from ..recipes.composition import Stage
from ..recipes.config import OptimConfig
from ..recipes.contract import Phase
from ..recipes.technique import Technique
from ..runs.coverage import record_coverage
from ..runs.memory import PeakMemory
from ..runs.run import Run, run_of

log = logging.getLogger(__name__)


def start_run(recipe: OptimConfig, config: PreTrainedConfig) -> Run:
    """Return the run of a recipe on a model with this configuration, its steps registered as plugins.

    Raises pluggy's ``PluginValidationError`` for a step with a hook that does not exist.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hookspecs)
    # pluggy calls the last registered first.
    for step in reversed(recipe.steps):
        manager.register(step)
    manager.check_pending()
    return Run(recipe, config, manager)


def proceed(run: Run, source: Any = None) -> None:
    """Go through the stages until one waits for training or all are done. ``source`` is calibration data, or None.

    The model is then ready for its owner: its ``save_pretrained`` writes what the run made of it.
    """
    if source is not None:
        run.source = source
    while (stage := run.stage) is not None:
        if run.stage_entered:
            break
        _enter(run, stage)
        if stage.trains:
            log.info("%s waits for training: use hf_optim.OptimTrainer, or callbacks(model) in a Trainer", stage)
            break
        complete_stage(run)
    saving.attach_save_methods(run)


def complete_stage(run: Run) -> None:
    """Finalize the current stage and settle its traits; the next stage, if any, is then the current one."""
    assert run.stage is not None
    run.call("finalize_model")
    record_coverage(run, run.stage.steps)
    for step in run.stage.steps:
        contract = step.contract()
        run.traits -= contract.drops
        run.traits |= contract.adds
    run.stage_index += 1
    run.stage_entered = False
    run.record.finished = run.finished
    run.record.traits = sorted(str(t) for t in run.traits)


def _enter(run: Run, stage: Stage) -> None:
    with staged(run) as entry:
        for step in _transforming(run, stage):
            for model in run.call_on([step], "transform_model"):
                run.model = model
        if stage.calibrates:
            if stage.needs_data and run.data is None:
                run.data = _data(run)
                run.record.calibration = run.data.description
            entry |= drivers.calibrate(run, stage, run.journal)


def _transforming(run: Run, stage: Stage) -> list[Technique]:
    """The steps of a stage that have ``transform_model``: in recipe order, those first whose hook is ``tryfirst``.

    A step is called alone, since each must find the model that the one before it returned.
    """
    # pluggy keeps them in the reverse of the order in which it calls them.
    called = [id(impl.plugin) for impl in reversed(run.manager.hook.transform_model.get_hookimpls())]
    return sorted((step for step in stage.steps if id(step) in called), key=lambda step: called.index(id(step)))


@contextmanager
def staged(run: Run) -> Iterator[dict[str, Any]]:
    """Enter the stage in work, and put its entry on the record: what the body adds, time, and peak memory."""
    assert run.stage is not None
    run.stage_entered = True
    entry: dict[str, Any] = {"steps": [step.name for step in run.stage.steps], "driver": None}
    started = time.perf_counter()
    with PeakMemory(run.device) as memory:
        yield entry
    entry |= {"seconds": round(time.perf_counter() - started, 3), **memory.figures()}
    run.record.stages.append(entry)


def require_data(run: Run, source: Any) -> None:
    """Raise ``DataError`` if a stage that comes before any training needs calibration data and none is named."""
    if source is not None or run.recipe.calibration.dataset is not None:
        return
    for stage in run.stages:
        for step in stage.steps:
            if step.implements("calibrate") and step.needs_data():
                raise DataError(
                    f"{run.label(step)} needs calibration data: pass calibration=... (texts, token ids, a dataset or a "
                    "file), or name it in the recipe under `calibration: {dataset: ...}`"
                )
        if stage.trains:
            return


def _data(run: Run) -> Any:
    from ..data.calibration_set import calibration_data

    if run.source is None and run.recipe.calibration.dataset is None:
        require_data(run, None)
        raise DataError(f"{run.stage} needs calibration data: call hf_optim.advance(model, calibration=...)")
    if run.tokenizer is None:
        run.tokenizer = find_processor(getattr(run.model.config, "_name_or_path", ""), run.model.main_input_name)
    return calibration_data(
        run.source, model_config=run.model.config, tokenizer=run.tokenizer, data=run.recipe.calibration
    )


def finish_stage(run: Run) -> None:
    """Finalize the training stage in work, and go on with the recipe as far as the data at hand allows."""

    stage = run.stage
    complete_stage(run)
    log.info("%s is finished: %d masked parameters, traits %s", stage, len(run.masks), ", ".join(run.record.traits))
    following = run.stage
    if following is not None and not _can_follow(run, following):
        log.warning("%s comes next: call model = hf_optim.advance(model, calibration=...)", following)
        return
    advance(run.model)


def _can_follow(run: Run, stage: Stage) -> bool:
    # A transform may put another model in the place of the one that the Trainer and its owner hold. A step that merely
    # looks at the model there (to copy it as a teacher) says so in phases().
    if any(Phase.TRANSFORM in step.phases() for step in stage.steps):
        return False
    return not stage.needs_data or any(x is not None for x in (run.data, run.source, run.recipe.calibration.dataset))


def advance(model: PreTrainedModel, calibration: Any = None) -> PreTrainedModel:
    """Go on with a recipe after its training stage: finish the stage in work, then run the stages that follow.

    A ``Trainer`` with hf_optim's callbacks calls this itself when training ends. Without a ``Trainer``, call it when
    your own loop is done. Returns the model, which may be another object than before.
    """
    run = run_of(model)
    if run.stage is not None and run.stage_entered:
        complete_stage(run)
    proceed(run, calibration)
    return run.model
