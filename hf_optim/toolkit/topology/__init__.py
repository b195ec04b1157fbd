"""How a transformer is wired, found by looking: its blocks, what reads which norm, which layers form a pair.

Nothing here knows an architecture by name. One forward on fake tensors records which operation reads which tensor
(``tracing``); what the operations between two layers do to the channels is found by running those operations on random
numbers (``replay``). The model is never called, its weights are never read, and nothing about it changes.

Functions that need the trace take a model or a ``Trace``; give them the same ``trace(model)`` to trace only once.
"""

from . import linear_layers
from .block_lists import Block, blocks, by_block, is_output_head
from .experts import ExpertLinear, expert_linears, has_experts
from .fake_inputs import dummy_inputs
from .layer_coverage import coverage
from .layer_pairs import LinearPair, linear_pairs
from .linear_layers import features, is_linear, linears, owners, weight_out_in
from .norm_groups import NormGroup, norm_to_linears
from .prunable_units import HEADS, NEURONS, Units, coupled, find_units
from .residual_order import stream_order
from .residual_stream import Residual, find_residual, permute_residual_
from .selection import match
from .tracing import trace

__all__ = [
    "HEADS",
    "NEURONS",
    "Block",
    "ExpertLinear",
    "LinearPair",
    "NormGroup",
    "Residual",
    "Units",
    "blocks",
    "by_block",
    "coupled",
    "coverage",
    "dummy_inputs",
    "expert_linears",
    "features",
    "find_residual",
    "find_units",
    "has_experts",
    "is_linear",
    "is_output_head",
    "linear_layers",
    "linear_pairs",
    "linears",
    "match",
    "norm_to_linears",
    "owners",
    "permute_residual_",
    "stream_order",
    "trace",
    "weight_out_in",
]
