"""The teacher of a training stage: prepared when training starts, used by the loss, released when the stage ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn
from transformers import TrainerCallback

from hf_optim import Technique
from hf_optim.toolkit.distillation import hidden_states, teachers

if TYPE_CHECKING:
    from hf_optim import Run


class Distillation(Technique):
    """A technique with the field ``device`` that trains the model against a frozen teacher.

    The state of the step has ``teacher``, the module as it was given, copied or loaded, and ``ready``, the same module
    once it is frozen, in evaluation mode and on its device.
    """

    device: str

    def find_teacher(self, run: Run) -> nn.Module:
        """Return the teacher after checking it against the student. Raises ``ModelError`` if there is none."""
        raise NotImplementedError

    def ready_teacher(self, run: Run) -> nn.Module:
        """Return the teacher, frozen, in evaluation mode and on its device; the first call prepares it."""
        own = run.state(self)
        if getattr(own, "ready", None) is None:
            own.ready = teachers.freeze(self.find_teacher(run), teachers.input_device(run.model), self.device)
        return own.ready

    def release_teacher(self, run: Run, *keys: str) -> None:
        """Remove the teacher, the recorder of hidden states and ``keys`` from the state of the step."""
        own = run.state(self)
        hidden_states.remove_recorder(own)
        for name in ("teacher", "ready", *keys):
            vars(own).pop(name, None)


class TeacherCallback(TrainerCallback):
    """Prepares the teacher when training starts, so that an error in it shows before the first step."""

    def __init__(self, step: Any, run: Run) -> None:
        self.step, self.run = step, run

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.step.ready_teacher(self.run)
