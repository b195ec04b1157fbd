"""The stages of a run, in order: transform, calibrate, (train), finalize."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from . import calibration, saving
from .compose import Stage
from .errors import DataError
from .memory import PeakMemory
from .run import Run
from .techniques import Technique

log = logging.getLogger(__name__)


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
        run.complete_stage()
    saving.bind(run)


def _enter(run: Run, stage: Stage) -> None:
    with staged(run) as entry:
        for step in _transforming(run, stage):
            for model in run.call_on([step], "transform_model"):
                run.model = model
        if stage.calibrates:
            if stage.needs_data and run.data is None:
                run.data = _data(run)
                run.record.calibration = run.data.description
            entry |= calibration.calibrate(run, stage, run.journal)


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
    from .data import calibration_data

    if run.source is None and run.recipe.calibration.dataset is None:
        require_data(run, None)
        raise DataError(f"{run.stage} needs calibration data: call hf_optim.advance(model, calibration=...)")
    if run.tokenizer is None:
        run.tokenizer = find_processor(getattr(run.model.config, "_name_or_path", ""), run.model.main_input_name)
    return calibration_data(
        run.source, model_config=run.model.config, tokenizer=run.tokenizer, data=run.recipe.calibration
    )


def find_processor(home: str, main_input: str = "input_ids", **arguments: Any) -> Any:
    """The tokenizer (or, for models that read pixels, the image processor) beside a checkpoint, or None."""
    from transformers import AutoImageProcessor, AutoTokenizer

    reader = AutoImageProcessor if main_input == "pixel_values" else AutoTokenizer
    try:
        return reader.from_pretrained(home, **arguments) if home else None
    except (OSError, ValueError, KeyError):
        return None
