"""The Trainer callback that finishes a training stage."""

from __future__ import annotations

import logging
from typing import Any

from transformers import TrainerCallback

from ..lifecycle.stages import end_training
from ..recipes.composition import Stage
from ..runs.memory import PeakMemory
from ..runs.run import Run, StageState
from .checkpoint_callback import CheckpointCallback

log = logging.getLogger(__name__)


class StageCallback(TrainerCallback):
    """Completes the training stage when training ends, and continues with the recipe. Comes last."""

    def __init__(self, run: Run, stage: Stage, states: CheckpointCallback) -> None:
        self.run, self.stage, self.states = run, stage, states
        self._memory: PeakMemory | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.run.stage is self.stage:
            self.run.stage_state = StageState.TRAINING
            self._memory = PeakMemory(args.device).start()
            log.info("training stage %s: %d steps", self.stage, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run, memory = self.run, self._memory
        if run.stage is not self.stage or memory is None:
            return
        memory.stop()
        run.stage_state = StageState.ENTERED
        run.record.stages.append(
            {
                "steps": [step.name for step in self.stage.steps],
                "driver": "training",
                "training_steps": state.global_step,
                "seconds": round(self.states.elapsed, 3),
                **memory.metrics(),
            }
        )
        if has_adapters(run):
            log.warning(
                "%s is trained, with adapters in place: hf_optim.merge_adapters(model) merges them under the "
                "masks and continues with the recipe",
                self.stage,
            )
            return
        end_training(run)


def has_adapters(run: Run) -> bool:
    """Return True if a module of the model is wrapped by an adapter layer (peft)."""
    return any(hasattr(module, "base_layer") for module in run.model.modules())
