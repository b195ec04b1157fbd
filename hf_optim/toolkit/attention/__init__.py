"""Sparse attention: patterns as data, and everything that follows from one."""

from ..modules import remote_code_guard
from . import attachment, attend, blocked, caches, flash_cpu, kept, layout, model_caches, pattern, rows, settings, terms
from .attachment import FIELD, Attachment, PatternConfig, PatternModel, number_layers
from .attend import HeadPatterns
from .cached_tokens import patterns_of, tokens_kept
from .caches import PatternLayer, slots_for
from .kept import Kept, kept_attention
from .pattern import Pattern, visible
from .settings import chosen, whole, wholes
from .share import share_of_attention
from .terms import Band, Chunks, Columns, GlobalTokens, ShiftedChunks, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (
    remote_code_guard, terms, pattern, layout, blocked, flash_cpu, rows, attend, kept, caches, model_caches, attachment,
    settings,
)  # fmt: skip

__all__ = [
    "FIELD",
    "STORED",
    "Attachment",
    "Band",
    "Chunks",
    "Columns",
    "GlobalTokens",
    "HeadPatterns",
    "Kept",
    "Pattern",
    "PatternConfig",
    "PatternLayer",
    "PatternModel",
    "ShiftedChunks",
    "Term",
    "attachment",
    "attend",
    "chosen",
    "kept_attention",
    "number_layers",
    "patterns_of",
    "share_of_attention",
    "slots_for",
    "tokens_kept",
    "visible",
    "whole",
    "wholes",
]
