"""Masks, schedules, gates and structural pruning."""

from . import (
    decay_checks,
    gated_layers,
    hard_concrete,
    masked_layers,
    masks,
    nm_groups,
    noisy_layers,
    schedules,
    shrink,
    sparsity,
)
from .masked_layers import TRAINING_FORWARD
from .masks import require_finite
from .rounds import ROUNDS
from .sparse_variational import WeightNoise
from .sparsegpt import obs_mask

__all__ = [
    "ROUNDS",
    "TRAINING_FORWARD",
    "WeightNoise",
    "decay_checks",
    "gated_layers",
    "hard_concrete",
    "masked_layers",
    "masks",
    "nm_groups",
    "noisy_layers",
    "obs_mask",
    "require_finite",
    "schedules",
    "shrink",
    "sparsity",
]
