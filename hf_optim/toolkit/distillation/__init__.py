"""Distillation: teachers, students, and losses on logits, hidden states and outputs of attention."""

from . import attention_outputs, hidden_losses, hidden_states, logit_cache, losses, students, teachers
from .attention_outputs import AttentionDistillation

__all__ = [
    "AttentionDistillation",
    "attention_outputs",
    "hidden_losses",
    "hidden_states",
    "logit_cache",
    "losses",
    "students",
    "teachers",
]
