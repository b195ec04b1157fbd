"""How long a recipe takes: measured on a few training steps or a few blocks of the real run, and extrapolated."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from transformers import TrainerCallback

from ...checkpoints.source import load_model, load_processor
from ...data.calibration_set import CalibrationData
from ...errors import RecipeError
from ...lifecycle.loading import optimize
from ...recipes.composition import Stage
from ...recipes.technique import Technique
from ...runs.memory import PeakMemory
from ...runs.run import Run, run_of
from ...toolkit.checkpoint.placement import NewHeads
from ...training.fit import train_stage
from .calibration_cost import duration
from .plan import Plan
from .preflight import read_calibration, require_named_data

# Training steps after the first one, which allocates: as many as fit into the seconds, within these bounds.
FEWEST, MOST, SECONDS = 3, 20, 20.0
BLOCKS = 3
BATCHES = 2


class _Enough(Exception):
    """Enough has been measured."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measured time of a stage.

    Attributes:
        what: what was measured.
        fixed: seconds that do not depend on the number of units.
        units: steps, blocks or batches of the whole stage.
        seconds: those of each unit that was measured.
    """

    what: str
    fixed: float
    units: int
    seconds: Sequence[float]

    def total(self, of_one: float) -> float:
        """Return the seconds of the stage if each unit takes ``of_one``."""
        return self.fixed + self.units * of_one

    def to_dict(self, stage: Stage) -> dict[str, Any]:
        """Return JSON types: the total for the median unit, the fastest and the slowest."""
        return {
            "steps": [step.name for step in stage.steps],
            "measured": self.what,
            "fixed_seconds": round(self.fixed, 3),
            "units": self.units,
            "seconds": round(self.total(statistics.median(self.seconds)), 3),
            "low": round(self.total(min(self.seconds)), 3),
            "high": round(self.total(max(self.seconds)), 3),
        }


def measure_time(plan: Plan, estimates: Mapping[str, Any]) -> dict[str, Any]:
    """Load the model, run a few steps or blocks of every stage, and extrapolate to the whole recipe.

    Each stage is measured on the model as it is loaded, since the stages before it are not run to their end. A stage
    that cannot run on that model has ``seconds: null``, as has the total then.

    Args:
        plan: what is to be done. Its data must be named.
        estimates: ``estimate(plan, model)``.

    Returns ``{"load_seconds", "stages", "seconds", "low", "high", "peak_host_bytes", "readable"}`` in JSON types.
    Raises ``OptimError`` as the run itself would.
    """
    require_named_data(plan)
    if plan.recipe.driver == "streamed":
        raise RecipeError("--time measures a model in memory, which driver streamed never has: leave out --time")
    started = time.perf_counter()
    with PeakMemory() as memory:
        model = load_model(plan.source, NewHeads.ALL if plan.trains else NewHeads.CLASSIFIERS)
        tokenizer = load_processor(plan.source, type(model))
        calibration = read_calibration(plan, tokenizer)
        loaded = time.perf_counter() - started
        stages = []
        for number, stage in enumerate(plan.recipe.stages):
            model = load_model(plan.source, NewHeads.ALL) if number else model
            found = _measure_stage(plan, stage, model, tokenizer, calibration, estimates["stages"][number])
            stages.append({"steps": [step.name for step in stage.steps], "seconds": None} | (found or {}))
    total: dict[str, float | None] = {}
    for key in ("seconds", "low", "high"):
        known = [seconds for stage in stages if (seconds := stage.get(key)) is not None]
        total[key] = round(loaded + sum(known), 3) if len(known) == len(stages) else None
    return {
        "load_seconds": round(loaded, 3),
        "stages": stages,
        **total,
        "peak_host_bytes": memory.metrics()["peak_host_bytes"],
        "readable": _readable(loaded, stages, total),
    }


def _readable(loaded: float, stages: Sequence[Mapping[str, Any]], total: Mapping[str, Any]) -> dict[str, str]:
    rows = {"loading the model and the data": duration(loaded)}
    for stage in stages:
        name = "[" + ", ".join(stage["steps"]) + "]"
        if stage["seconds"] is None:
            rows[name] = "not known: it cannot start on the model as it is loaded"
        else:
            rows[name] = f"{_range(stage)}, from {stage['measured']}"
    rows["in all, without saving"] = "not known" if total["seconds"] is None else _range(total)
    return rows


def _range(found: Mapping[str, Any]) -> str:
    return f"{duration(found['seconds'])} ({found['low']:,.0f} to {found['high']:,.0f} s)"


def _measure_stage(
    plan: Plan,
    stage: Stage,
    model: Any,
    tokenizer: Any,
    calibration: CalibrationData | None,
    cost: Mapping[str, Any],
) -> dict[str, Any] | None:
    """Return the measured time of one stage; None if it cannot start on this model."""
    recipe = dataclasses.replace(plan.recipe, steps=stage.steps)
    try:
        if stage.trains:
            found = _measure_training(plan, recipe, model, tokenizer, calibration, cost)
        elif cost["driver"] == "blockwise":
            found = _measure_blocks(plan, recipe, model, tokenizer, calibration)
        else:
            found = _measure_whole(plan, recipe, model, tokenizer, calibration)
    except RecipeError:  # a trait that the stages before would add
        return None
    return found.to_dict(stage)


# -- training ---------------------------------------------------------------------------------------------------------
class _StepTimer(TrainerCallback):
    """Takes the time of training steps, and ends the training when it has enough."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.began = self._last = time.perf_counter()
        self.first = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = time.perf_counter()
        if state.global_step == 1:
            self.first = now - self.began
        else:
            self.seconds.append(now - self._last)
        self._last = now
        enough = len(self.seconds) >= FEWEST and (sum(self.seconds) > SECONDS or len(self.seconds) >= MOST)
        if enough or state.global_step >= state.max_steps:
            self.total_steps = state.max_steps
            raise _Enough


def _measure_training(
    plan: Plan, recipe: Any, model: Any, tokenizer: Any, calibration: CalibrationData | None, cost: Mapping[str, Any]
) -> Measured:
    timer, started = _StepTimer(), time.perf_counter()
    # The device of calibration is where the run would calibrate; the Trainer moves the model itself.
    model = optimize(model, recipe, calibration, tokenizer=tokenizer, device=plan.resolved_device, dense=plan.dense)
    training = {**plan.training_arguments, "save_strategy": "no", "disable_tqdm": True}
    timer.began = time.perf_counter()
    with suppress(_Enough):
        train_stage(model, tokenizer, plan.training_data, training, callbacks=[timer])
    seconds = timer.seconds or [timer.first]
    fixed = timer.began - started + (timer.first - statistics.median(seconds) if timer.seconds else 0.0)
    return Measured(f"{len(seconds)} training steps", max(0.0, fixed), timer.total_steps, seconds)


# -- calibration ------------------------------------------------------------------------------------------------------
class _BlockTimer:
    """A journal that keeps nothing: it takes the time of blocks, and ends the calibration when it has enough."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def restore(self, run: Run, first: Technique, name: str) -> bool:
        if not self.ends:
            self.ends.append(time.perf_counter())
        return False

    def save(self, run: Run, first: Technique, name: str) -> None:
        self.ends.append(time.perf_counter())
        if len(self.ends) > BLOCKS:
            raise _Enough


def _measure_blocks(
    plan: Plan, recipe: Any, model: Any, tokenizer: Any, calibration: CalibrationData | None
) -> Measured:
    from ...toolkit import topology

    timer, started = _BlockTimer(), time.perf_counter()
    blocks = len(topology.blocks(model))
    with suppress(_Enough):
        optimize(
            model,
            recipe,
            calibration,
            tokenizer=tokenizer,
            device=plan.resolved_device,
            journal=timer,
            dense=plan.dense,
        )
    seconds = [later - earlier for earlier, later in zip(timer.ends, timer.ends[1:], strict=False)]
    if not seconds:  # steps that need the whole model at once
        return Measured("the whole stage", 0.0, 1, [time.perf_counter() - started])
    # A run saves every block for --resume, and computes its outputs for the next one: both are in the later times.
    return Measured(f"{len(seconds)} of {blocks} blocks", timer.ends[0] - started, blocks, seconds[1:] or seconds)


def _measure_whole(
    plan: Plan, recipe: Any, model: Any, tokenizer: Any, calibration: CalibrationData | None
) -> Measured:
    """Measure a whole-model calibration on a few batches; all the work counts as proportional to them."""
    started = time.perf_counter()
    batches = len(calibration) if calibration is not None else 1
    few = calibration
    if calibration is not None and batches > BATCHES:
        few = CalibrationData(calibration.batches[:BATCHES], calibration.description, calibration.labels[:BATCHES])
    run = run_of(optimize(model, recipe, few, tokenizer=tokenizer, device=plan.resolved_device, dense=plan.dense))
    assert run is not None
    taken = len(few) if few is not None else 1
    seconds = (time.perf_counter() - started) / taken
    return Measured(f"{taken} of {batches} batches", 0.0, batches, [seconds])
