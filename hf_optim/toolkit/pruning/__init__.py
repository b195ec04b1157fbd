"""Masks, schedules, gates and structural pruning."""

from . import hard_concrete, masked_layers, masks, nm_groups, noisy_layers, shrink, sparsity
from .decay_checks import check_decay_stability, negligible_decay, peak_rate
from .gated_layers import Gates, GroupGates, WeightGates
from .masked_layers import TRAINING_FORWARD, MaskedLayer, require_unsharded, select_supported
from .masks import mask_out_in, require_finite
from .noisy_layers import NoisyLayer
from .rounds import ROUNDS
from .schedules import (
    SparsitySchedule,
    as_step,
    check_positions,
    cut_schedule_message,
    linear_schedule,
    unfinished_schedule_message,
)
from .sparse_variational import WeightNoise

__all__ = [
    "ROUNDS",
    "TRAINING_FORWARD",
    "Gates",
    "GroupGates",
    "MaskedLayer",
    "NoisyLayer",
    "SparsitySchedule",
    "WeightGates",
    "WeightNoise",
    "as_step",
    "check_decay_stability",
    "check_positions",
    "cut_schedule_message",
    "hard_concrete",
    "linear_schedule",
    "mask_out_in",
    "masked_layers",
    "masks",
    "negligible_decay",
    "nm_groups",
    "noisy_layers",
    "peak_rate",
    "require_finite",
    "require_unsharded",
    "select_supported",
    "shrink",
    "sparsity",
    "unfinished_schedule_message",
]
