"""Distillation: teachers, students, and losses on logits and hidden states."""

from . import hidden_losses, hidden_states, logit_cache, losses, students, teachers

__all__ = [
    "hidden_losses",
    "hidden_states",
    "logit_cache",
    "losses",
    "students",
    "teachers",
]
