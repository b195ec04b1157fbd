"""What is to be done with a model: the part of a job that ``check`` and ``compress`` have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig

from ...checkpoints.source import ModelSource, resolve_device
from ...recipes.config import DataConfig, OptimConfig


def bytes_per_weight(config: PreTrainedConfig) -> int:
    """Return the bytes of a weight in the dtype of a configuration; of float32 if that names none."""
    dtype = getattr(config, "dtype", None)  # a value of config.json, which may be anything
    return (dtype if isinstance(dtype, torch.dtype) else torch.float32).itemsize


@dataclass(frozen=True)
class Plan:
    """What is to be done with a model.

    Attributes:
        source: the model.
        recipe: the recipe, with its calibration data.
        training: data for stages that train; None takes the calibration data's source.
        dense: write the dense equivalent instead of a compressed format.
        device: where it runs; None means CUDA if available.
    """

    source: ModelSource
    recipe: OptimConfig
    training: DataConfig | None = None
    dense: bool = False
    device: str | None = None

    @property
    def training_data(self) -> DataConfig:
        """The data of stages that train."""
        return self.training or self.recipe.calibration

    @property
    def training_arguments(self) -> dict[str, Any]:
        """The ``TrainingArguments`` of stages that train."""
        return {**({"use_cpu": True} if self.device == "cpu" else {}), **self.recipe.training}

    @property
    def resolved_device(self) -> torch.device:
        """Where it runs."""
        return resolve_device(self.device) or torch.device("cpu")

    @property
    def width(self) -> int:
        """The bytes of a weight."""
        if self.source.dtype != "auto":
            return int(getattr(torch, self.source.dtype).itemsize)
        return bytes_per_weight(self.source.config)

    @property
    def trains(self) -> bool:
        """True if a stage of the recipe trains."""
        return any(stage.trains for stage in self.recipe.stages)

    @property
    def needs_calibration(self) -> bool:
        """True if a stage of the recipe needs calibration data."""
        return any(stage.needs_data for stage in self.recipe.stages)
