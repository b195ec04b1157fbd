"""The main job: from a model and a recipe to a checkpoint with its record, its measured metrics and its card."""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ...calibration.block_journal import BlockJournal
from ...calibration.streamed.spill import spill_folder
from ...checkpoints import dense, saving
from ...checkpoints.atomic import require_replaceable
from ...checkpoints.source import checkpoint_bytes, load_model, load_processor, resolve_device
from ...data.calibration_set import CalibrationData
from ...data.datasets import require_readable, require_texts
from ...data.tasks import task_of_model
from ...errors import CheckpointError
from ...evaluation.evaluate import compare
from ...lifecycle.loading import optimize
from ...lifecycle.stages import advance
from ...recipes.traits import FLOAT_WEIGHTS, QUANTIZED
from ...runs import distributed, progress
from ...runs.claims import settle_reload
from ...runs.folder_lock import locked, real_path
from ...runs.resume_header import HEADER
from ...runs.run import Run, run_of
from ...toolkit.checkpoint.model_config import model_class
from ...toolkit.checkpoint.placement import NewHeads
from ...training.fit import CAUSAL_TASKS, RANDOM, train_stage
from .control import TRAIN, require_trainable_control, trained_control
from .job import Job
from .measuring import Measuring, add_figures, control_figures, evaluate_checkpoint
from .preflight import Findings, preflight, read_calibration
from .streamed import StreamedJob

log = logging.getLogger(__name__)


def compress(job: Job) -> Run:
    """Run the job. Returns the finished run with its model, and its record as written to ``hf_optim.json``.

    Refuses what it can before any weight is read. The output is locked meanwhile: one process writes to it at a time.
    Raises ``OptimError`` (see ``hf_optim.errors``).
    """
    device = resolve_device(job.device)
    job = replace(job, source=job.source.pinned())
    if job.control == TRAIN:
        require_trainable_control(job)
    _refuse_output(job)
    for data in (job.evaluation, job.training):
        if data is not None and data.dataset != RANDOM:
            require_readable(data)
    found = preflight(job.plan, job.output)
    _require_texts(job, found.model)
    _note_default_epochs(job)
    with locked(job.output) if distributed.is_main() else contextlib.nullcontext():
        if distributed.is_main():
            require_replaceable(job.output)
            _require_spill(job.recipe.spill)
        return _compress(job, device, found)


def _compress(job: Job, device: torch.device | None, found: Findings) -> Run:
    for note in found.notes:
        job.print_line(note)
    tokenizer = load_processor(job.source, model_class(job.source.config))
    calibration = _calibration(job, tokenizer, found)
    measured: dict[str, Any] = {"before": {}, "after": {}}
    if job.evaluation and distributed.is_main():
        measured["before"] = evaluate_checkpoint(job, job.source.model, "original")
        if job.control == TRAIN:
            measured["control"] = trained_control(job, tokenizer)
        elif job.control:
            measured["control"] = control_figures(job, job.control)
    if job.recipe.driver == "streamed":
        return _streamed(job, found.meta_model, calibration, tokenizer, device, measured)
    trains = any(stage.trains for stage in job.recipe.stages)
    model = load_model(job.source, NewHeads.ALL if trains else NewHeads.CLASSIFIERS)
    original_bytes = checkpoint_bytes(job.source, model)
    journal = BlockJournal(_journal_home(job.output), resume=job.resume)
    model = optimize(
        model,
        job.recipe,
        calibration,
        tokenizer=tokenizer,
        device=device,
        journal=journal,
        dense=job.dense,
        announce=False,
    )
    model = _train(job, model, tokenizer)
    run = run_of(model)
    run.model = model  # the caller gets the run alone
    distributed.require_equal_weights(model)
    if not distributed.is_main():
        return run
    run.record.base_model["revision"] = job.source.revision
    if job.dense:
        _make_dense(run)
    _record_measured(job, run, measured, original_bytes)
    if job.evaluation:
        with progress.stage("comparing with the original"):
            run.record.measured["after"] |= _compare(job, run)
    measuring = Measuring(job, run)
    saving.save(run, job.output, measure=measuring)
    # Kept until here, and if the run fails: calibrated blocks need not be calibrated again.
    journal.remove()
    measuring.report()
    return run


def _streamed(
    job: Job, found: Any, calibration: CalibrationData | None, tokenizer: Any, device: Any, measured: dict[str, Any]
) -> Run:
    """Run the job under the streamed driver, with one block at a time in memory."""
    work = StreamedJob(
        job.recipe, found, job.source, _journal_home(job.output), job.resume, calibration, tokenizer, device
    )
    work.calibrate()
    original_bytes = sum(path.stat().st_size for path in found.files)
    _record_measured(job, work.run, measured, original_bytes)
    measuring = Measuring(job, work.run)
    work.save(job.output, measure=measuring)
    work.output.remove()
    measuring.report()
    return work.run


def _record_measured(job: Job, run: Run, measured: dict[str, Any], original_bytes: int) -> None:
    run.record.measured = {**measured, "before": {"bytes_on_disk": original_bytes, **measured["before"]}}
    if job.evaluation:
        add_figures(run.record, job.evaluation, {})


def _require_texts(job: Job, model: Any) -> None:
    """Raise ``DataError`` for data of evaluation or training that has no texts, which language models read."""
    task, plan = task_of_model(model).tag, job.plan
    # Models with a masked head can also be evaluated on scored pairs of sentences.
    needed = [job.evaluation] if task in CAUSAL_TASKS else []
    needed += [plan.training_data] if plan.trains and task in (*CAUSAL_TASKS, "fill-mask") else []
    for data in needed:
        if data is not None and data.dataset != RANDOM:
            require_texts(data)


def _refuse_output(job: Job) -> None:
    real_path(job.output)
    if os.path.exists(job.output) and not os.path.isdir(job.output):
        raise CheckpointError(f"{job.output} is a file, not a directory")
    if os.path.isdir(job.output) and os.path.isdir(job.source.model) and job.output.samefile(job.source.model):
        raise CheckpointError(f"{job.output} is the model itself: choose another directory to write to")


def _note_default_epochs(job: Job) -> None:
    for stage in job.recipe.stages:
        if stage.trains and not (job.recipe.training or {}).keys() & {"max_steps", "num_train_epochs"}:
            log.info("%s trains for 3 epochs: the recipe names no max_steps and no num_train_epochs", stage)


def _calibration(job: Job, tokenizer: Any, found: Findings) -> CalibrationData | None:
    """Read and check the batches now: bad data should not show after an hour."""
    return read_calibration(job.plan, tokenizer, found.model)


def _compare(job: Job, run: Run) -> dict[str, Any]:
    """Return top-1 agreement with and KL divergence to the original, if the model has a vocabulary to compare over."""
    assert job.evaluation is not None
    device = resolve_device(job.device) or torch.device("cpu")
    ours: Any = run.model
    return compare(ours.to(device), load_model(job.source).to(device), run.tokenizer, job.evaluation)


def _train(job: Job, model: Any, tokenizer: Any) -> Any:
    """Run the training stages of the recipe, if any, and the stages that follow them."""
    while run_of(model).stage is not None:
        if not run_of(model).stage_entered:
            model = advance(model)
            continue
        model = train_stage(model, tokenizer, job.plan.training_data, job.plan.training_arguments)
    return model


def _make_dense(run: Run) -> None:
    rounded = dense.convert_to_dense(run.model)
    run.traits = (run.traits - {QUANTIZED}) | {FLOAT_WEIGHTS}
    run.record.traits = sorted(map(str, run.traits))
    settle_reload(run)
    run.record.note(
        "Written as its dense equivalent: the weights have the values of the compressed format, stored uncompressed."
    )
    if rounded:
        run.record.note(
            f"The compressed format also rounds the inputs of {len(rounded)} layers, which dense weights cannot "
            "represent: outputs differ from those of the compressed checkpoint by that rounding."
        )


def _require_spill(spill: str | os.PathLike[str] | None) -> None:
    """Raise ``CheckpointError`` if activations cannot be written to the directory ``spill``; it need not exist."""
    if spill is not None:
        with spill_folder(spill):
            pass


def has_kept_work(output: Path) -> bool:
    """Return True if an interrupted run to ``output`` left blocks or training checkpoints that ``resume`` takes up."""
    return any(path.is_file() and path.name != HEADER for path in _journal_home(output).rglob("*"))


def _journal_home(output: Path) -> Path:
    real = real_path(output)
    return real.with_name(f".{real.name}.journal")
