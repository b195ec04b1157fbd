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
    learned,
    model_caches,
    pattern,
    row_state,
    rows,
    settings,
    state_cache,
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
from .learned import PART, LearnedAttachment, LearnedConfig, LearnedModel, add_parts, attentions
from .pattern import Pattern, visible
from .row_state import Call, NewTokens, TensorState
from .rows import SEGMENTS, Apart, Rows
from .settings import LARGEST, MOST, chosen, whole, wholes
from .share import share_of_attention
from .state_cache import HoldsState, StateLayer
from .terms import Band, Chunks, Columns, GlobalTokens, ShiftedChunks, Spans, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (
    remote_code_guard, terms, pattern, layout, blocked, flash_cpu, rows, attend, kept, caches, model_caches, settings,
    attachment,
)  # fmt: skip
GLOBAL_TOKENS = (global_tokens, global_models)  # in addition, of techniques with global tokens
LEARNED = (row_state, state_cache, learned)  # in addition, of attention with learned parts and a state

__all__ = [
    "FIELD",
    "GLOBAL_TOKENS",
    "LARGEST",
    "LEARNED",
    "MOST",
    "PART",
    "SEGMENTS",
    "STORED",
    "Apart",
    "Attachment",
    "Band",
    "Call",
    "Chunks",
    "Columns",
    "GlobalAttachment",
    "GlobalTokens",
    "GlobalTokensModel",
    "HeadPatterns",
    "HoldsState",
    "Kept",
    "LearnedAttachment",
    "LearnedConfig",
    "LearnedModel",
    "NewTokens",
    "Pattern",
    "PatternConfig",
    "PatternLayer",
    "PatternModel",
    "Pieces",
    "PreparedModel",
    "Rows",
    "ShiftedChunks",
    "Spans",
    "StateLayer",
    "TensorState",
    "Term",
    "add_parts",
    "attachment",
    "attend",
    "attentions",
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
