"""Sparse attention: patterns as data, and everything that follows from one."""

from ..modules import mixed, mixed_classes, relative_difference, remote_code_guard, reversible
from . import (
    attachment,
    attend,
    blocked,
    caches,
    dense_attention,
    device_constants,
    distance_bias,
    flash_cpu,
    flash_plan,
    global_models,
    global_tokens,
    head_caches,
    head_patterns,
    kept,
    layout,
    learned,
    lsh_chunks,
    lsh_cuts,
    lsh_flash,
    lsh_hashing,
    lsh_kernel,
    lsh_layer,
    lsh_places,
    model_caches,
    pattern,
    pattern_models,
    reversible_layers,
    row_state,
    rows,
    set_layers,
    settings,
    state_cache,
    terms,
)
from .attached import attach_again, detach
from .attachment import FIELD, Attachment, read_mask, require_all_keys, with_bias
from .attend import attend_lists, lists_for, masked_attention
from .block_mask import block_mask
from .blocked import DistanceBias
from .cached_tokens import most_seen, patterns_of, tokens_kept
from .caches import PatternLayer, slots_for
from .dense_attention import dense_product
from .device_constants import constant_on
from .distance_bias import attend_biased, nearest_keys
from .fixed_cache import FixedGroupsLayer, FixedLayer, Slots
from .flash_cpu import Source
from .global_models import (
    GlobalAttachment,
    GlobalTokensModel,
    differ_by_row,
    projections_of,
    static_tokens,
    with_static,
)
from .global_tokens import Pieces
from .head_caches import HeadGroupsLayer, groups_of
from .head_patterns import HeadPatterns, seen_mask
from .kept import Kept, kept_attention, take_tokens
from .learned import PART, LearnedAttachment, LearnedConfig, LearnedModel, add_parts, attentions, initialize_part
from .lsh_chunks import lsh_attention, unit_keys
from .lsh_hashing import WIDEST, draw_rotations, hash_vectors
from .lsh_layer import LshAttachment, NoKeys, drop_key_projections
from .lsh_places import BUCKET, MOST_BUCKETS, PAPER, TRAX, LshScheme
from .model_caches import call_uncompiled
from .pattern import Pattern, kept_tensors, visible
from .pattern_models import (
    PatternConfig,
    PatternModel,
    PreparedModel,
    is_detached,
    number_layers,
    require_no_weights,
)
from .proof import (
    Called,
    ProbedCall,
    Proved,
    context_length,
    probe,
    prove,
    require_on_interface,
    require_self_attention,
)
from .reach import attends_to_the_far_end, hidden_states, is_causal, perturbed
from .reversible_layers import (
    ReversibleLayer,
    add_streams,
    arguments_of,
    branch_of,
    layers_with,
    names_of_layers,
    returns_tuple,
    without_cache,
)
from .reversible_proof import layout_of, prove_layout
from .ring_cache import RingLayer, RingTokens
from .ring_cache import serves as serves_rings
from .row_state import Call, NewTokens, TensorState
from .rows import SEGMENTS, Apart, Rows
from .set_layers import ISAB, MAB, PMA, SAB, attend_to_set
from .settings import LARGEST, MOST, ReadSettings, chosen, flag, whole, wholes
from .share import share_of_attention
from .state_cache import HoldsState, StateLayer
from .terms import Band, Chunks, Columns, GlobalTokens, Segments, ShiftedChunks, Spans, Term

# Modules whose source is stored with a checkpoint, each before those that import from it.
STORED = (
    remote_code_guard, terms, pattern, layout, blocked, dense_attention, flash_plan, flash_cpu, rows, device_constants,
    head_patterns, attend, kept, caches, model_caches, settings, mixed_classes, attachment, pattern_models,
)  # fmt: skip
GLOBAL_TOKENS = (global_tokens, global_models)  # in addition, of techniques with global tokens
LEARNED = (row_state, state_cache, learned)  # in addition, of attention with learned parts and a state
LSH_PAGES = (  # in addition, of techniques with LSH attention and reversible layers
    reversible, lsh_hashing, lsh_places, lsh_cuts, lsh_flash, lsh_kernel, lsh_chunks, lsh_layer, reversible_layers,
)  # fmt: skip
BY_DISTANCE = (distance_bias, head_caches)  # in addition, of techniques with a bias by distance and caches by head

__all__ = [
    "BUCKET",
    "BY_DISTANCE",
    "FIELD",
    "GLOBAL_TOKENS",
    "ISAB",
    "LARGEST",
    "LEARNED",
    "LSH_PAGES",
    "MAB",
    "MOST",
    "MOST_BUCKETS",
    "PAPER",
    "PART",
    "PMA",
    "SAB",
    "SEGMENTS",
    "STORED",
    "TRAX",
    "WIDEST",
    "Apart",
    "Attachment",
    "Band",
    "Call",
    "Called",
    "Chunks",
    "Columns",
    "DistanceBias",
    "FixedGroupsLayer",
    "FixedLayer",
    "GlobalAttachment",
    "GlobalTokens",
    "GlobalTokensModel",
    "HeadGroupsLayer",
    "HeadPatterns",
    "HoldsState",
    "Kept",
    "LearnedAttachment",
    "LearnedConfig",
    "LearnedModel",
    "LshAttachment",
    "LshScheme",
    "NewTokens",
    "NoKeys",
    "Pattern",
    "PatternConfig",
    "PatternLayer",
    "PatternModel",
    "Pieces",
    "PreparedModel",
    "ProbedCall",
    "Proved",
    "ReadSettings",
    "ReversibleLayer",
    "RingLayer",
    "RingTokens",
    "Rows",
    "Segments",
    "ShiftedChunks",
    "Slots",
    "Source",
    "Spans",
    "StateLayer",
    "TensorState",
    "Term",
    "add_parts",
    "add_streams",
    "arguments_of",
    "attach_again",
    "attachment",
    "attend",
    "attend_biased",
    "attend_lists",
    "attend_to_set",
    "attends_to_the_far_end",
    "attentions",
    "block_mask",
    "branch_of",
    "call_uncompiled",
    "chosen",
    "constant_on",
    "context_length",
    "dense_product",
    "detach",
    "differ_by_row",
    "draw_rotations",
    "drop_key_projections",
    "flag",
    "groups_of",
    "hash_vectors",
    "hidden_states",
    "initialize_part",
    "is_causal",
    "is_detached",
    "kept_attention",
    "kept_tensors",
    "layers_with",
    "layout_of",
    "lists_for",
    "lsh_attention",
    "lsh_chunks",
    "lsh_flash",
    "masked_attention",
    "mixed",
    "most_seen",
    "names_of_layers",
    "nearest_keys",
    "number_layers",
    "patterns_of",
    "perturbed",
    "probe",
    "projections_of",
    "prove",
    "prove_layout",
    "read_mask",
    "relative_difference",
    "require_all_keys",
    "require_no_weights",
    "require_on_interface",
    "require_self_attention",
    "returns_tuple",
    "seen_mask",
    "serves_rings",
    "set_layers",
    "share_of_attention",
    "slots_for",
    "static_tokens",
    "take_tokens",
    "tokens_kept",
    "unit_keys",
    "visible",
    "whole",
    "wholes",
    "with_bias",
    "with_static",
    "without_cache",
]
