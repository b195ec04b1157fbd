"""What ``hf-optim compress`` is to do: a model, a recipe, data and an output."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ...checkpoints.source import ModelSource
from ...recipes.config import DataConfig, OptimConfig
from .plan import Plan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """A model to compress, and how.

    Attributes:
        source: the model.
        recipe: the recipe, with its calibration data.
        output: the directory to write.
        evaluation: data to measure the model on, before and after; None measures nothing.
        control: a model to measure on the same data and to show beside the result: for recipes that train, a dense one
            that was trained alike; ``train`` trains one for that (``control.train_control``), None is for none.
        training: data for stages that train; None takes the calibration data's source.
        dense: write the dense equivalent instead of a compressed format.
        resume: continue a calibration or training that was killed.
        device: where blocks are calibrated and models are measured; None means CUDA if available.
        print_line: called with each line of progress.
    """

    source: ModelSource
    recipe: OptimConfig
    output: Path
    evaluation: DataConfig | None = None
    training: DataConfig | None = None
    control: str | None = None
    dense: bool = False
    resume: bool = False
    device: str | None = None
    print_line: Callable[[str], None] = field(default=log.info)

    @property
    def plan(self) -> Plan:
        """What ``preflight`` checks of the job."""
        return Plan(self.source, self.recipe, self.training, self.dense, self.device)
