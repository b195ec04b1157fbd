"""The state machine of a run: start, enter a stage, complete it, fail it, advance to the next, release the model.

A stage is *pending*; entering it transforms and calibrates the model, after which it is *entered*; if it trains it is
*training* from the first step of a ``Trainer`` on; completing it finalizes the model and makes the next stage current.
A state changes only after its work. A stage whose work raised has *failed* and stays failed: the model is partly
changed, so only ``release`` accepts it.
"""

from __future__ import annotations

import inspect
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import pluggy
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from .. import hookspecs
from ..calibration import drivers
from ..calibration.media_inputs import require_media
from ..checkpoints import saving
from ..checkpoints.hub import commit_of
from ..checkpoints.source import find_multimodal_processor, find_processor
from ..compressed.packed.accelerate import decode_loaded
from ..errors import MAX_MESSAGE, DataError, OptimError, RecipeError, require_any_model
from ..recipes import hooks
from ..recipes.composition import Stage, step_label
from ..recipes.config import OptimConfig
from ..recipes.contract import Phase
from ..recipes.field_checks import did_you_mean
from ..recipes.technique import MARK, Technique
from ..runs import training_watch
from ..runs.acceptance import require_finite, require_model
from ..runs.base_licence import licence_of
from ..runs.claims import settle_reload, warn_unfulfilled
from ..runs.coverage import note_left_alone, record_coverage, recount_zeros, require_effective
from ..runs.memory import PeakMemory
from ..runs.progress import silenced
from ..runs.record import public_name
from ..runs.run import ATTRIBUTE, Run, StageState, find_run, require_sound, run_of, traits_of
from ..runs.stored_zeros import KnownZeros, describe_masks, find_pending, known_zeros
from ..toolkit import topology
from ..trust.bounds import first_line
from .step_checks import require_supported_steps

log = logging.getLogger(__name__)

# The work of entering a stage: transforms and calibrates, and returns what the record says of it.
Work = Callable[[Run, Stage], Mapping[str, Any]]


# -- start ------------------------------------------------------------------------------------------------------------
def start_run(recipe: OptimConfig, config: PreTrainedConfig) -> Run:
    """Return the run of a recipe on a model with this configuration, its steps registered as plugins.

    Raises ``RecipeError`` for a step that implements a hook that does not exist, or one with an argument that the hook
    does not have.
    """
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hookspecs)
    # pluggy calls the last registered first.
    for number, step in reversed(list(enumerate(recipe.steps))):
        try:
            manager.register(step, name=step_label(number, step))
            manager.check_pending()
        except pluggy.PluginValidationError as error:
            raise RecipeError(f"{step_label(number, step)}: {_wrong_hook(step, error)}") from error
    return Run(recipe, config, manager)


def _wrong_hook(step: Technique, error: Exception) -> str:
    """Return which hook of a step does not fit its specification, and how it could."""
    known = {name: hook for name, hook in vars(hookspecs).items() if hasattr(hook, f"{hooks.PROJECT}_spec")}
    for name in dir(type(step)):
        method = inspect.getattr_static(type(step), name)
        if not hasattr(method, MARK):
            continue
        if name not in known:
            return f"no hook {name!r}{did_you_mean(name, known)} (the hooks are {', '.join(known)})"
        allowed = list(inspect.signature(known[name]).parameters)
        given = list(inspect.signature(method).parameters)[1:]
        for argument in given:
            if argument not in allowed:
                hint = did_you_mean(argument, allowed)
                return f"the hook {name} has no argument {argument!r}{hint} (it has {', '.join(allowed)})"
    return first_line(error)


def attach_model(
    run: Run, model: PreTrainedModel, source: Any, revision: str | None = None, zeros: KnownZeros | None = None
) -> None:
    """Give a run its model, and record where the model comes from. A run that the model had before is released.

    ``zeros`` are those that an earlier run has pruned, if they are known already.
    """
    zeros = known_zeros(model) if zeros is None else zeros
    if find_run(model) is not None:
        release(model)
    run.model = model
    run.traits = traits_of(model)
    zeros.give(run)
    run.record.base_model = {
        "id": public_name(source),
        "revision": commit_of(os.fspath(source), revision) if source is not None else None,
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    if licence := licence_of(source, revision):
        run.record.base_model["license"] = licence


# -- enter ------------------------------------------------------------------------------------------------------------
def enter_stage(run: Run, work: Work | None = None) -> None:
    """Transform and calibrate the model for the current stage.

    Args:
        work: what to do, if not ``transform`` and ``calibrate`` with the driver of the recipe.
    """
    stage = _current(run)
    if work is None:  # an error here leaves the stage pending: nothing has changed
        require_model(run.model)
        if any(step.phases() - {Phase.LOAD} for step in run.recipe.steps):
            decode_loaded(run.model)
        find_pending(run)
        _load_data(run, stage)
        require_finite(run.model, "", "")
        _require_effective_patterns(run, stage)
        _require_supported(run)
    with _failing(run, "transforming and calibrating"), PeakMemory(run.device) as memory:
        started = time.perf_counter()
        if work is not None:
            note_left_alone(run, stage.steps)
        details = (work or _transform_and_calibrate)(run, stage)
        seconds = round(time.perf_counter() - started, 3)
    entry = {"steps": [step.name for step in stage.steps], "driver": None, **details, "seconds": seconds}
    run.record.stages.append({**entry, **memory.metrics()})
    run.stage_state = StageState.ENTERED


def _require_effective_patterns(run: Run, stage: Stage) -> None:
    """Refuse patterns without effect, and layers that the data does not reach, in steps on the model as it is now."""
    for step in stage.steps:
        if step.changes_architecture():
            break
        require_effective(step, run.model, run.label(step))
        require_media(run, step)


def _require_supported(run: Run) -> None:
    """Raise ``ModelError`` if a step cannot work on the model, as far as it is known by now."""
    completed = sum(len(stage.steps) for stage in run.stages[: run.stage_index])
    first = max(run.steps_checked, completed)
    run.steps_checked = require_supported_steps(run.recipe, run.model, first, dense=run.dense)


def _transform_and_calibrate(run: Run, stage: Stage) -> Mapping[str, Any]:
    transforming = _transforming(run, stage)
    for step in transforming:
        note_left_alone(run, [step])
        for model in run.call_on([step], "transform_model"):
            run.model = model
            require_finite(model, "", run.label(step))
    note_left_alone(run, [step for step in stage.steps if step not in transforming])
    for number, step in enumerate(run.recipe.steps):
        if step in stage.steps and step.implements("transform_model"):
            run.steps_checked = max(run.steps_checked, number + 1)
    _require_supported(run)
    return drivers.calibrate(run, stage, run.journal) if stage.calibrates else {}


def _transforming(run: Run, stage: Stage) -> list[Technique]:
    """Return the steps of a stage that implement ``transform_model`` in recipe order, ``tryfirst`` ones first.

    Each is called alone, since it must find the model that the one before it returned.
    """
    # pluggy lists implementations in the reverse of the order in which it calls them.
    called = [id(impl.plugin) for impl in reversed(run.manager.hook.transform_model.get_hookimpls())]
    return sorted((step for step in stage.steps if id(step) in called), key=lambda step: called.index(id(step)))


# -- complete, fail ---------------------------------------------------------------------------------------------------
def complete_stage(run: Run) -> None:
    """Finalize the current stage and update the traits of the model; the next stage, if any, becomes current."""
    stage = _current(run)
    if run.stage_state is StageState.TRAINING:
        sentence = f"{stage.label}: training did not reach its end (it was interrupted or raised)"
        run.record.note(sentence)
        log.warning("%s; the stage is completed with the model as it is", sentence)
    with _failing(run, "finalizing"):
        run.call("finalize_model")
        require_finite(run.model, "", str(stage))
        record_coverage(run, stage.steps)
        recount_zeros(run)
        run.record.pruned = describe_masks(run)
        warn_unfulfilled(run, stage.steps)
    for step in stage.steps:
        contract = step.contract()
        run.traits -= contract.drops
        run.traits |= contract.adds
    run.stage_index += 1
    run.stage_state = StageState.PENDING
    run.record.finished = run.finished
    run.record.traits = sorted(str(t) for t in run.traits)
    if run.finished:
        settle_reload(run)
        run.drop_inputs()


def fail_stage(run: Run, doing: str, error: BaseException) -> None:
    """Mark the current stage as failed. From then on ``advance`` and ``save_pretrained`` of the model refuse."""
    run.stage_state = StageState.FAILED
    reason = first_line(error, MAX_MESSAGE // 2, typed=True)
    run.failure = f"{run.stage.label if run.stage else 'the run'} failed while {doing} ({reason})"
    run.drop_inputs()
    saving.attach_save_methods(run)


@contextmanager
def _failing(run: Run, doing: str) -> Iterator[None]:
    try:
        with silenced():  # the bars of what the steps call; their stages are shown
            yield
    except BaseException as error:
        fail_stage(run, doing, error)
        raise


def _current(run: Run) -> Stage:
    """Return the current stage. Raises ``OptimError`` if it has failed or all stages are complete."""
    require_sound(run)
    if run.stage is None:
        raise OptimError("all stages of this recipe are complete")
    return run.stage


# -- advance ----------------------------------------------------------------------------------------------------------
def advance(model: PreTrainedModel, calibration: Any = None) -> PreTrainedModel:
    """Complete the current training stage of a model, then run the stages that follow, up to the next that trains.

    A ``Trainer`` with hf_optim's callbacks calls this itself when training ends. Without a ``Trainer``, call it when
    your own training loop has ended.

    Args:
        model: a model whose recipe waits for training, or for data.
        calibration: data for the stages that follow, as in ``optimize``; None for what the recipe names.

    Returns the model, which may be another object than before. Raises ``OptimError`` if a stage has failed, naming it
    and the error.
    """
    run = run_of(model)
    require_sound(run)
    if run.stage is not None and run.stage_entered:
        complete_stage(run)
    return run_stages(run, calibration)


def run_stages(run: Run, source: Any = None) -> PreTrainedModel:
    """Run the pending stages up to the next one that needs training, and return the model, which the caller then owns.

    The model then has a ``save_pretrained`` that writes the record and the card with it.

    Args:
        source: calibration data of the caller, or None.
    """
    if source is not None:
        run.source = source
    training_watch.unwatch(run.model)  # steps of the recipe may train
    try:
        while (stage := run.stage) is not None and not run.stage_entered:
            # Tensors made under torch.inference_mode() could not be trained or changed afterwards.
            with torch.inference_mode(False):
                enter_stage(run)
            if stage.trains:
                level = logging.WARNING if run.announce else logging.DEBUG
                log.log(level, "%s starts when training starts: %s", stage, training_watch.remedy(run))
                break
            complete_stage(run)
        saving.attach_save_methods(run)
        if run.announce:
            training_watch.watch(run, run.model)
    finally:
        model = run.lend_model()
    return model


def end_training(run: Run) -> None:
    """Complete the current training stage, and run the stages that follow as far as the available data allows."""
    stage, trained = run.stage, run.model
    complete_stage(run)
    log.info("%s is complete: %d masked parameters, traits %s", stage, len(run.masks), ", ".join(run.record.traits))
    following = run.stage
    if following is not None and not _can_follow(run, following):
        log.warning("%s comes next: call model = hf_optim.advance(model, calibration=...)", following)
        return
    model = run_stages(run)
    if model is not trained:
        run.model = model  # nobody else has it: the Trainer holds the one that it trained


def _can_follow(run: Run, stage: Stage) -> bool:
    # A transform may replace the model that the Trainer and its caller hold. A step that only reads the model there
    # (to copy it as a teacher) says so in phases().
    if any(Phase.TRANSFORM in step.phases() for step in stage.steps):
        return False
    return not stage.needs_data or any(x is not None for x in (run.data, run.source, run.recipe.calibration.dataset))


# -- release ----------------------------------------------------------------------------------------------------------
def release(model: PreTrainedModel) -> PreTrainedModel:
    """Forget the run of a model, and return it as an ordinary model. Its weights and its stored format stay."""
    require_any_model(model)
    training_watch.unwatch(model)
    model.__dict__.pop(ATTRIBUTE, None)
    saving.detach_save_methods(model)
    return model


# -- data -------------------------------------------------------------------------------------------------------------
def require_data(run: Run, source: Any) -> None:
    """Raise ``DataError`` if a stage that comes before any training needs calibration data and there is none."""
    if source is not None or run.recipe.calibration.dataset is not None:
        return
    for stage in run.stages:
        for step in stage.steps:
            if step.implements("calibrate") and step.needs_data():
                named = "or name it in the recipe under `calibration: {dataset: ...}`"
                raise DataError(
                    f"{run.label(step)} needs calibration data: pass calibration=... (texts, token ids, a dataset or a "
                    f"file), {named}",
                    cli=f"{run.label(step)} needs calibration data: pass --calibration DATA, {named}",
                )
        if stage.trains:
            return


def _load_data(run: Run, stage: Stage) -> None:
    """Load the calibration data of a run, if the stage needs it. Raises ``DataError`` if there is none."""
    from ..data.calibration_set import build_calibration_data

    if not stage.needs_data or run.data is not None:
        return
    if run.source is None and run.recipe.calibration.dataset is None:
        require_data(run, None)
        raise DataError(f"{stage.label} needs calibration data: call hf_optim.advance(model, calibration=...)")
    if run.tokenizer is None:
        run.tokenizer = find_processor(getattr(run.model.config, "_name_or_path", ""), run.model.main_input_name)
    run.data = build_calibration_data(
        run.source,
        model_config=run.model.config,
        tokenizer=run.tokenizer,
        data=run.recipe.calibration,
        model=run.model,
        load_processor=partial(find_multimodal_processor, getattr(run.model.config, "_name_or_path", "")),
    )
    require_inputs(run.model, run.data)
    run.record.calibration = run.data.description


def require_inputs(model: PreTrainedModel, batches: Iterable[Mapping[str, Any]]) -> None:
    """Keep an example of the batches for tracing. Raises ``DataError`` if one lacks an input that the model reads.

    The model may be on the meta device.
    """
    for number, batch in enumerate(batches):
        if number == 0:
            topology.set_example(model, batch)
        given = {name.replace("inputs_embeds", "input_ids") for name in batch} | set(batch)
        try:
            missing = sorted(set(topology.dummy_inputs(model)) - given)
        except topology.NoInputsError:
            return
        if missing:
            found = (
                f"{type(model).__name__} also reads {' and '.join(missing)}: calibration batch {number} "
                f"has {', '.join(sorted(batch))} only; "
            )
            raise DataError(
                f"{found}pass batches with all of them, calibration=[{{...}}]",
                cli=f"{found}pass --calibration DATA with a column for each of them",
            )
