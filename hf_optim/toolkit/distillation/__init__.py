"""Distillation: teachers, students, and losses on logits and hidden states."""

from . import losses, students, teachers
from .hidden_losses import cosine_loss, squarehead_loss, token_masks
from .hidden_states import (
    HiddenStates,
    HiddenStatesCallback,
    base_model_of_blocks,
    base_models,
    remove_recorder,
    take_hidden_states,
)
from .logit_cache import LogitCache, cached_top_k
from .losses import DIRECTIONS, RESTS, Direction, Head, Rest, TopK, head_kind, scored_rows, top_k, top_k_kd_loss

__all__ = [
    "DIRECTIONS",
    "RESTS",
    "Direction",
    "Head",
    "HiddenStates",
    "HiddenStatesCallback",
    "LogitCache",
    "Rest",
    "TopK",
    "base_model_of_blocks",
    "base_models",
    "cached_top_k",
    "cosine_loss",
    "head_kind",
    "losses",
    "remove_recorder",
    "scored_rows",
    "squarehead_loss",
    "students",
    "take_hidden_states",
    "teachers",
    "token_masks",
    "top_k",
    "top_k_kd_loss",
]
