"""Masks, schedules, gates and shrinking: the maths of pruning."""

from . import hard_concrete, masked_layers, masks, nm_groups, noisy_layers, shrink, sparsity
from .gated_layers import Gates, UnitGates, WeightGates
from .masked_layers import TRAINING_FORWARD, MaskedLayer, require_whole, trainable
from .masks import mask_of, require_finite
from .noisy_layers import NoisyLayer
from .rounds import ROUNDS
from .schedules import Ramp, as_step, check_positions, cut_ramp, linear_ramp, unfinished_ramp
from .sparse_variational import WeightNoise

__all__ = [
    "ROUNDS",
    "TRAINING_FORWARD",
    "Gates",
    "MaskedLayer",
    "NoisyLayer",
    "Ramp",
    "UnitGates",
    "WeightGates",
    "WeightNoise",
    "as_step",
    "check_positions",
    "cut_ramp",
    "hard_concrete",
    "linear_ramp",
    "mask_of",
    "masked_layers",
    "masks",
    "nm_groups",
    "noisy_layers",
    "require_finite",
    "require_whole",
    "shrink",
    "sparsity",
    "trainable",
    "unfinished_ramp",
]
