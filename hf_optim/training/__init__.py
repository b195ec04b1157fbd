"""Training an optimized model: ``OptimTrainer``, the callbacks of a stage, rounds of pruning, adapters."""

from .peft import keep_masks, merge_adapters
from .pruning_rounds import Rounds
from .rounds_callback import RoundTraining
from .stage_callbacks import callbacks
from .trainer import OptimTrainer

__all__ = ["OptimTrainer", "RoundTraining", "Rounds", "callbacks", "keep_masks", "merge_adapters"]
