"""Sparse attention: patterns as data, and everything that follows from one."""

from . import attachment, attend, blocked, layout, pattern, rows, settings, terms
from .attachment import FIELD, Attachment, PatternConfig, PatternModel, number_layers
from .attend import HeadPatterns
from .pattern import Pattern, visible
from .share import share_of_attention
from .terms import Band, Chunks, Columns, GlobalTokens, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (terms, pattern, layout, blocked, rows, attend, attachment, settings)

__all__ = [
    "FIELD",
    "STORED",
    "Attachment",
    "Band",
    "Chunks",
    "Columns",
    "GlobalTokens",
    "HeadPatterns",
    "Pattern",
    "PatternConfig",
    "PatternModel",
    "Term",
    "attachment",
    "attend",
    "number_layers",
    "share_of_attention",
    "visible",
]
