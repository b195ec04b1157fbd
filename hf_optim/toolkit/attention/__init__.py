"""Sparse attention: patterns as data, and everything that follows from one."""

from ..modules import remote_code_guard
from . import (
    attachment,
    attend,
    blocked,
    caches,
    flash_cpu,
    global_models,
    global_tokens,
    kept,
    layout,
    model_caches,
    pattern,
    rows,
    settings,
    terms,
)
from .attachment import FIELD, Attachment, PatternConfig, PatternModel, PreparedModel, number_layers
from .attend import HeadPatterns
from .cached_tokens import patterns_of, tokens_kept
from .caches import PatternLayer, slots_for
from .global_models import (
    GlobalAttachment,
    GlobalTokensModel,
    differ_by_row,
    projections_of,
    static_tokens,
    with_static,
)
from .global_tokens import Pieces
from .kept import Kept, kept_attention
from .pattern import Pattern, visible
from .rows import SEGMENTS, Apart, Rows
from .settings import LARGEST, MOST, chosen, whole, wholes
from .share import share_of_attention
from .terms import Band, Chunks, Columns, GlobalTokens, ShiftedChunks, Spans, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (
    remote_code_guard, terms, pattern, layout, blocked, flash_cpu, rows, attend, kept, caches, model_caches, settings,
    attachment,
)  # fmt: skip
GLOBAL_TOKENS = (global_tokens, global_models)  # in addition, of techniques with global tokens

__all__ = [
    "FIELD",
    "GLOBAL_TOKENS",
    "LARGEST",
    "MOST",
    "SEGMENTS",
    "STORED",
    "Apart",
    "Attachment",
    "Band",
    "Chunks",
    "Columns",
    "GlobalAttachment",
    "GlobalTokens",
    "GlobalTokensModel",
    "HeadPatterns",
    "Kept",
    "Pattern",
    "PatternConfig",
    "PatternLayer",
    "PatternModel",
    "Pieces",
    "PreparedModel",
    "Rows",
    "ShiftedChunks",
    "Spans",
    "Term",
    "attachment",
    "attend",
    "chosen",
    "differ_by_row",
    "kept_attention",
    "number_layers",
    "patterns_of",
    "projections_of",
    "share_of_attention",
    "slots_for",
    "static_tokens",
    "tokens_kept",
    "visible",
    "whole",
    "wholes",
    "with_static",
]
