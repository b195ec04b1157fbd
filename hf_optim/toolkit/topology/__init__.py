"""The structure of a transformer, found on a trace: its blocks, norm groups, linear pairs and prunable groups.

No architecture is known by name. One forward on fake tensors records which operation reads which tensor (``tracing``);
how the operations between two layers act on the channels is determined by re-executing them on random numbers
(``reexecution``). The model is not called or changed, and its weights are not read.

Functions that need a trace take a model or a ``Trace``. Pass the same ``trace(model)`` to all of them to trace once.
"""

from .block_lists import Block, blocks, group_by_block, known_blocks, require_blocks
from .exchanged_states import exchanged_state
from .experts import ExpertLinear, expert_linears, expert_stacks, has_experts
from .fake_inputs import NoInputsError, dummy_inputs, set_example, shorten_example
from .feed_forward import FeedForward, find_feed_forwards
from .feed_forward_places import inlet_entries, place_layer
from .feed_forward_selection import select_feed_forwards
from .key_value_heads import KeyValueHeads, find_key_value_heads
from .layer_coverage import coverage
from .layer_pairs import LinearPair, find_linear_pairs
from .linear_layers import features, is_linear, linears, parameter_names, weight_out_in
from .norm_groups import NormGroup, find_norm_groups
from .prunable_groups import HEADS, NEURONS, PrunableGroups, coupled_layers, find_prunable_groups
from .reasons import NOT_REACHED, not_reached, require_layers, summarize
from .residual_permutation import find_residual_order, permute_residual_
from .residual_stream import ResidualStream, find_residual_stream
from .roles import Role, is_output_head, output_heads, roles, routes
from .selection import match
from .stream_rotation import RotatedNorm, StreamRotation, find_stream_rotations
from .targets import default_takes, ineffective_pattern, left_alone, select_layers, unprunable_experts
from .tracing import WithoutWeightsError, trace
from .value_rotation import ValueHeads, find_value_heads
from .weight_roles import weights_left_alone

__all__ = [
    "HEADS",
    "NEURONS",
    "NOT_REACHED",
    "Block",
    "ExpertLinear",
    "FeedForward",
    "KeyValueHeads",
    "LinearPair",
    "NoInputsError",
    "NormGroup",
    "PrunableGroups",
    "ResidualStream",
    "Role",
    "RotatedNorm",
    "StreamRotation",
    "ValueHeads",
    "WithoutWeightsError",
    "blocks",
    "coupled_layers",
    "coverage",
    "default_takes",
    "dummy_inputs",
    "exchanged_state",
    "expert_linears",
    "expert_stacks",
    "features",
    "find_feed_forwards",
    "find_key_value_heads",
    "find_linear_pairs",
    "find_norm_groups",
    "find_prunable_groups",
    "find_residual_order",
    "find_residual_stream",
    "find_stream_rotations",
    "find_value_heads",
    "group_by_block",
    "has_experts",
    "ineffective_pattern",
    "inlet_entries",
    "is_linear",
    "is_output_head",
    "known_blocks",
    "left_alone",
    "linears",
    "match",
    "not_reached",
    "output_heads",
    "parameter_names",
    "permute_residual_",
    "place_layer",
    "require_blocks",
    "require_layers",
    "roles",
    "routes",
    "select_feed_forwards",
    "select_layers",
    "set_example",
    "shorten_example",
    "summarize",
    "trace",
    "unprunable_experts",
    "weight_out_in",
    "weights_left_alone",
]
