"""Teachers, students, and the losses between them."""

from . import losses, students, teachers
from .hidden_losses import cosine_loss, squarehead_loss, token_masks
from .hidden_states import HiddenStates, HiddenStatesCallback, bodies, bodies_of_blocks, forget_states, take_states
from .logit_cache import LogitCache, sample_keys
from .losses import DIRECTIONS, RESTS, Direction, Head, Rest, TopK, head_of, scored_rows, top_k, top_k_kd_loss

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
    "bodies",
    "bodies_of_blocks",
    "cosine_loss",
    "forget_states",
    "head_of",
    "losses",
    "sample_keys",
    "scored_rows",
    "squarehead_loss",
    "students",
    "take_states",
    "teachers",
    "token_masks",
    "top_k",
    "top_k_kd_loss",
]
