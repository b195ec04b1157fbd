"""The callbacks of a training stage, in the order in which a ``Trainer`` must call them (docs/hooks.md)."""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback

from ..errors import OptimError
from ..recipes.contract import TRAINER_HOOKS
from ..runs import training_watch
from ..runs.run import Run, require_sound, run_of
from .checkpoint_callback import CheckpointCallback
from .end_of_stage import StageCallback
from .mask_callback import MaskCallback
from .nonfinite_callback import NonFiniteCallback


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """Return the callbacks with which a stock ``Trainer`` trains an optimized model: ``callbacks=callbacks(model)``.

    These are the callbacks of the steps of the current stage, and the host's: they keep masks through optimizer steps,
    save and restore masks and step states with every checkpoint, stop at NaN, and complete the stage when training
    ends. For a run whose stages are all complete (recovery, such as LoRA on a pruned model) only the masks are kept.

    Raises ``OptimError`` if the model has no run, if it does not wait for training, or if a step changes the loss or
    the optimizer groups, which needs ``hf_optim.OptimTrainer``.
    """
    run = run_of(model)
    for step in run.stage.steps if run.stage else ():
        for hook in TRAINER_HOOKS:
            if step.implements(hook):
                what = "adds to the loss" if hook == "training_loss" else "sets its own optimizer groups"
                raise OptimError(
                    f"{run.label(step)} {what}, which a stock Trainer has no callback for: use hf_optim.OptimTrainer "
                    "in its place (same arguments; it brings these callbacks itself)"
                )
    return stage_callbacks(run)


def stage_callbacks(run: Run) -> list[TrainerCallback]:
    """Return the same callbacks for a trainer that calls the other training hooks itself."""
    require_sound(run)
    training_watch.unwatch(run.model)
    stage = run.stage
    if stage is None:
        return [MaskCallback(run)] if run.masks else []
    if not stage.trains:
        raise OptimError(
            f"{stage.label} waits for data, not for training: call hf_optim.advance(model, calibration=...) first"
        )
    if not run.stage_entered:
        raise OptimError(f"{stage.label} was not prepared for training: call model = hf_optim.advance(model) first")
    native = [callback for group in run.call("training_callbacks") for callback in group]
    states = CheckpointCallback(run)
    return [states, NonFiniteCallback(run), *native, MaskCallback(run), StageCallback(run, stage, states)]
