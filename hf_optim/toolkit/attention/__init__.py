"""Sparse attention: patterns as data, and everything that follows from one."""

from ..modules import remote_code_guard
from . import attachment, attend, blocked, layout, pattern, rows, settings, terms
from .attachment import FIELD, Attachment, PatternConfig, PatternModel, number_layers
from .attend import HeadPatterns
from .pattern import Pattern, visible
from .settings import chosen, whole, wholes
from .share import share_of_attention
from .terms import Band, Chunks, Columns, GlobalTokens, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (remote_code_guard, terms, pattern, layout, blocked, rows, attend, attachment, settings)

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
    "chosen",
    "number_layers",
    "share_of_attention",
    "visible",
    "whole",
    "wholes",
]
