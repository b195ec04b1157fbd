"""Save and restore the state of a run with the checkpoints of a ``Trainer``."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..checkpoints.read_errors import readable_errors
from ..errors import CheckpointError
from ..recipes.field_checks import admits_json
from ..runs import snapshot, work_files
from ..runs.masking import stray_weights
from ..runs.run import Run
from ..toolkit.distributed import fsdp
from ..trust.bounds import shown
from ..trust.documents import read_mapping
from ..trust.files import require_inside
from ..trust.headers import read_header
from .saved_weights import complete_weights

log = logging.getLogger(__name__)

MASKS_NAME = "hf_optim_masks.safetensors"
STATE_NAME = "hf_optim_state.json"


class CheckpointCallback(TrainerCallback):
    """Writes masks, step states and the position in the recipe into every ``checkpoint-N``, and restores them from it.

    Tensors and plain JSON types in ``run.state(step)`` are saved. This callback comes first: when training is resumed,
    the callbacks of the steps find weights, masks and state as they were.

    Attributes:
        checkpoint: the folder that training resumes from, if the caller knows it.
        seconds: training time of this stage before it was resumed.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.checkpoint: str | None = None
        self.seconds = 0.0
        self._started = time.perf_counter()

    @property
    def elapsed(self) -> float:
        """Seconds of training of this stage, including those before it was resumed."""
        return self.seconds + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.perf_counter()
        if state.global_step > 0:
            folder = self._resumed_from(args, state)
            complete_weights(self.run.model, folder)
            self.seconds = float(read_state(self.run, folder).get("seconds", 0.0))
            stray = stray_weights(self.run)
            if stray:
                raise CheckpointError(
                    f"{folder} has other masks than the weights that were loaded (nonzero where pruned: {stray[0]}); "
                    "to resume from another folder than output_dir, set TrainingArguments(resume_from_checkpoint=...)"
                )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if not args.should_save:
            if fsdp.has_sharded_parameters(self.run.model):
                snapshot.take(self.run)  # gathering shards on the rank that writes involves all ranks
            return
        if not folder.is_dir():
            log.warning("no checkpoint folder %s: masks and step states were not saved", folder)
            return
        write_state(self.run, folder, {"seconds": round(self.elapsed, 3)})

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # The Trainer has just loaded the weights of its best checkpoint: masks and states must match them.
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            complete_weights(self.run.model, Path(state.best_model_checkpoint))
            read_state(self.run, Path(state.best_model_checkpoint))

    def _resumed_from(self, args: Any, state: Any) -> Path:
        given = self.checkpoint or args.resume_from_checkpoint
        if isinstance(given, (str, os.PathLike)) and os.path.isdir(given):
            return Path(given)
        return Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"


def write_state(run: Run, folder: Path, training: Mapping[str, Any]) -> None:
    """Write ``hf_optim_masks.safetensors`` and ``hf_optim_state.json``, each atomically."""
    tensors, meta = snapshot.take(run)
    beside = folder / f".{MASKS_NAME}"
    save_file(tensors, beside)
    os.replace(beside, folder / MASKS_NAME)
    beside = folder / f".{STATE_NAME}"
    content = {"run": meta, "training": dict(training), "masks": work_files.digest_file(folder / MASKS_NAME)}
    content["sha256"] = work_files.digest_json(content)
    beside.write_text(json.dumps(content, indent=1), encoding="utf-8")
    os.replace(beside, folder / STATE_NAME)


def read_state(run: Run, folder: Path) -> dict[str, Any]:
    """Restore what ``write_state`` wrote, and return ``training``. Raises ``CheckpointError`` if it does not fit."""
    for name in (STATE_NAME, MASKS_NAME):
        if not os.path.lexists(folder / name):
            raise CheckpointError(
                f"{folder} has no {name}: training cannot be resumed with its masks and schedules. Resume from a "
                "checkpoint written with hf_optim's callbacks, or start again from its weights"
            )
    found = read_mapping(folder / STATE_NAME, nonfinite=True)
    taken: Any = found.get("run")
    training = found.get("training")
    # Checkpoints of earlier versions have no checksum.
    stated = found.pop("sha256", None)
    read_header(require_inside(folder, MASKS_NAME), folder)
    if stated is not None and stated != work_files.digest_json(found):
        raise CheckpointError(
            f"{folder / STATE_NAME} is corrupt: its checksum is another; resume from another checkpoint"
        )
    if stated is not None and found.get("masks") != work_files.digest_file(folder / MASKS_NAME):
        raise CheckpointError(
            f"{folder / MASKS_NAME} is corrupt: its checksum is another; resume from another checkpoint"
        )
    with readable_errors(folder):
        tensors = load_file(folder / MASKS_NAME)
    snapshot.require_well_formed(run, tensors, taken, folder)
    if not isinstance(training, dict) or not admits_json(float, training.get("seconds", 0.0)):
        raise CheckpointError(f"{folder / STATE_NAME} is corrupt: training is {shown(training)}")
    snapshot.require_same(run, tensors, taken, folder)
    run.masks.clear()
    run.nm_patterns.clear()
    snapshot.restore(run, tensors, taken)
    return training
