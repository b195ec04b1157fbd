"""The host's callbacks around a training stage: its state in checkpoints, and its end."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from . import snapshot
from .compose import Stage
from .errors import CheckpointError
from .masking import stray_weights
from .memory import PeakMemory
from .run import Run
from .techniques import Phase
from .toolkit import shards

log = logging.getLogger(__name__)

MASKS_NAME = "hf_optim_masks.safetensors"
STATE_NAME = "hf_optim_state.json"


class StateKeeper(TrainerCallback):
    """Writes masks, step states and the place in the recipe into every ``checkpoint-N``, and restores them from it.

    What a step keeps in ``run.state(step)`` is saved if it is a tensor or a plain JSON type. It comes first: when
    training is resumed, the callbacks of the steps find masks and state as they were.

    Attributes:
        checkpoint: the folder that is being resumed from, if the caller knows.
        seconds: training time of this stage before a resumption.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.checkpoint: str | None = None
        self.seconds = 0.0
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of training of this stage, with those before a resumption."""
        return self.seconds + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        if state.global_step > 0:
            folder = self._resumed_from(args, state)
            self.seconds = float(read_state(self.run, folder).get("seconds", 0.0))
            stray = stray_weights(self.run)
            if stray:
                raise CheckpointError(
                    f"{folder} has other masks than the weights that were loaded (non-zero where pruned: {stray[0]}); "
                    "to resume from another folder than output_dir, set TrainingArguments(resume_from_checkpoint=...)"
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.should_save:
            if shards.has_shards(self.run.model):
                snapshot.take(self.run)  # the rank that writes gathers what is sharded, and needs the others
            return
        if not folder.is_dir():
            log.warning("no checkpoint folder %s: masks and step states were not saved", folder)
            return
        write_state(self.run, folder, {"seconds": round(self.elapsed, 3)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer has just loaded the weights of its best checkpoint: masks and states must be of that moment too.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            read_state(self.run, Path(state.best_model_checkpoint))

    def _resumed_from(self, args: Any, state: Any) -> Path:
        given = self.checkpoint or args.resume_from_checkpoint
        if isinstance(given, (str, os.PathLike)) and Path(given).is_dir():
            return Path(given)
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def write_state(run: Run, folder: Path, training: Mapping[str, Any]) -> None:
    """Write ``hf_optim_masks.safetensors`` and ``hf_optim_state.json``; each appears whole or not at all."""
    tensors, meta = snapshot.take(run)
    beside = folder / f".{MASKS_NAME}"
    save_file(tensors, beside)
    os.replace(beside, folder / MASKS_NAME)
    beside = folder / f".{STATE_NAME}"
    beside.write_text(json.dumps({"run": meta, "training": dict(training)}, indent=1), encoding="utf-8")
    os.replace(beside, folder / STATE_NAME)


def read_state(run: Run, folder: Path) -> dict[str, Any]:
    """Restore what ``write_state`` wrote, and return ``training``. Raises ``CheckpointError`` if that cannot be."""
    try:
        meta = json.loads((folder / STATE_NAME).read_text(encoding="utf-8"))
        tensors = load_file(folder / MASKS_NAME)
        taken, training = meta["run"], meta["training"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} has no {Path(error.filename or MASKS_NAME).name}: training cannot be resumed with its masks and "
            "schedules. Resume from a checkpoint written with hf_optim's callbacks, or start anew from its weights"
        ) from error
    except (ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{STATE_NAME} or {MASKS_NAME} in {folder} is corrupt ({error})") from error
    snapshot.require_same(run, tensors, taken, folder)
    run.masks.clear()
    run.nm_patterns.clear()
    snapshot.restore(run, tensors, taken)
    return training


class StageKeeper(TrainerCallback):
    """Ends the training stage when training ends: finalize, record, and go on with the recipe. Comes last."""

    def __init__(self, run: Run, stage: Stage, states: StateKeeper) -> None:
        self.run, self.stage, self.states = run, stage, states
        self._memory: PeakMemory | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.stage is self.stage:
            self._memory = PeakMemory(args.device).__enter__()
            log.info("training stage %s: %d steps", self.stage, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, memory = self.run, self._memory
        if run.stage is not self.stage or memory is None:
            return
        memory.__exit__()
        run.record.stages.append(
            {
                "steps": [step.name for step in self.stage.steps],
                "driver": "training",
                "training_steps": state.global_step,
                "seconds": round(self.states.elapsed, 3),
                **memory.figures(),
            }
        )
        if has_adapters(run):
            log.warning(
                "%s is trained, with adapters in place: hf_optim.integrations.peft.merge(model) merges them under the "
                "masks and goes on with the recipe",
                self.stage,
            )
            return
        finish_stage(run)


def has_adapters(run: Run) -> bool:
    """Whether a module of the model is wrapped by an adapter layer (peft)."""
    return any(hasattr(module, "base_layer") for module in run.model.modules())


def finish_stage(run: Run) -> None:
    """Finalize the training stage in work, and go on with the recipe as far as the data at hand allows."""
    from .loading import advance

    stage = run.stage
    run.complete_stage()
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
