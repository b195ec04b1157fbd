"""The callbacks of a training stage, in the order in which a ``Trainer`` has to call them."""

from __future__ import annotations

from torch import nn
from transformers import TrainerCallback

from ..errors import OptimError
from ..recipes.contract import TRAINER_HOOKS
from ..runs.run import Run, run_of
from .checkpoint_callback import CheckpointCallback
from .mask_callback import MaskCallback
from .nonfinite_callback import NonFiniteCallback
from .stage_callback import StageCallback


def callbacks(model: nn.Module) -> list[TrainerCallback]:
    """What a stock ``Trainer`` needs to train an optimized model: ``Trainer(..., callbacks=callbacks(model))``.

    The callbacks of the steps of the stage in work, between the host's own, which keep masks through optimizer steps,
    save and restore masks and step states with every checkpoint, stop at NaN, and finish the stage when training
    ends. For a run whose stages are all done (recovery, such as LoRA on a pruned model), what keeps the masks, if any.

    Raises ``OptimError`` when the model has no run, when it does not wait for training, or when a step changes the loss
    or the optimizer: that takes ``hf_optim.OptimTrainer``.
    """
    run = run_of(model)
    for step in run.stage.steps if run.stage else ():
        for hook in TRAINER_HOOKS:
            if step.implements(hook):
                what = "adds to the loss" if hook == "training_loss" else "sets optimizer groups of its own"
                raise OptimError(
                    f"{run.label(step)} {what}, which a stock Trainer has no callback for: use hf_optim.OptimTrainer "
                    "in its place (same arguments; it brings these callbacks itself)"
                )
    return stage_callbacks(run)


def stage_callbacks(run: Run) -> list[TrainerCallback]:
    """As ``callbacks``, for a trainer that serves the other training hooks itself."""
    stage = run.stage
    if stage is None:
        return [MaskCallback(run)] if run.masks else []
    if not stage.trains:
        raise OptimError(
            f"{stage} waits for data, not for training: call hf_optim.advance(model, calibration=...) first"
        )
    if not run.stage_entered:
        raise OptimError(f"{stage} was not prepared for training: call model = hf_optim.advance(model) first")
    native = [callback for group in run.call("training_callbacks") for callback in group]
    states = CheckpointCallback(run)
    return [states, NonFiniteCallback(run), *native, MaskCallback(run), StageCallback(run, stage, states)]
