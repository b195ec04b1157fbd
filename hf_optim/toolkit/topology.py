"""How a transformer is wired, found by looking: its blocks, what reads which norm, which layers form a pair.

Nothing here knows an architecture by name.  One forward on fake tensors shows which operation reads which
tensor (`tracing`); what the operations between two layers do to the channels is asked of the operations
themselves, on random numbers (`replaying`).  The model is never called, its weights are never read, and
nothing about it changes.

Functions that need the trace take a model or a `Trace`; give them the same `trace(model)` to look only once.
"""

from __future__ import annotations

from torch import nn

from .coverage import Coverage, Skipped, coverage
from .experts import ExpertLinear, expert_linears
from .graph import Trace
from .inputs import dummy_inputs
from .linear_layers import features, is_linear, linears, weight_out_in
from .norming import NormGroup, norm_groups
from .pairing import LinearPair, Partner, pairs
from .selecting import match
from .stacks import Block, Part, block_of, blocks
from .tracing import trace

__all__ = [
    "Block",
    "Coverage",
    "ExpertLinear",
    "LinearPair",
    "NormGroup",
    "Part",
    "Partner",
    "Skipped",
    "Trace",
    "block_of",
    "blocks",
    "coverage",
    "dummy_inputs",
    "expert_linears",
    "features",
    "has_experts",
    "is_linear",
    "is_output_head",
    "linear_pairs",
    "linears",
    "match",
    "norm_to_linears",
    "trace",
    "weight_out_in",
]


def is_output_head(model: nn.Module, name: str) -> bool:
    """Whether the linear `name` is the model's output embedding, or lies outside all blocks.

    False for what is no linear layer.  Raises `AttributeError` if the model has no such module.
    """
    module = model.get_submodule(name)
    if not is_linear(module):
        return False
    embeddings = getattr(model, "get_output_embeddings", lambda: None)()
    return module is embeddings or block_of(blocks(model), name) is None


def has_experts(model: nn.Module) -> bool:
    """Whether the model routes tokens to experts: as many modules or stacked matrices as its config says."""
    config = getattr(model, "config", None)
    if config is None:
        return False
    settings = config.get_text_config().to_dict() if hasattr(config, "get_text_config") else vars(config)
    counts = {
        value
        for key, value in settings.items()
        if "expert" in key and "per_tok" not in key and type(value) is int and value > 1
    }
    return any(_holds_experts(module, counts) for module in model.modules())


def _holds_experts(module: nn.Module, counts: set[int]) -> bool:
    """Whether a module is a list of experts or holds their matrices [experts, ., .], `counts` of them."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        return len(module) in counts
    return any(p.dim() == 3 and p.shape[0] in counts for p in module.parameters(recurse=False))


def norm_to_linears(source: nn.Module | Trace, block: Part | None = None) -> list[NormGroup]:
    """The norms of a model with the linears that read exactly their output, in the order in which they run.

    With `block` only the norms that it holds.  A norm that neither a linear nor any other weight reads is
    left out, and so is one whose gain is not called `weight`.  See `NormGroup` for what is exact.
    """
    return list(norm_groups(_traced(source), block))


def linear_pairs(source: nn.Module | Trace, block: Part | None = None) -> list[LinearPair]:
    """The pairs of linears whose channels correspond, in the order in which they run.

    With `block` only those whose producer it holds.  See `LinearPair` for what is exact.
    """
    return list(pairs(_traced(source), block))


def _traced(source: nn.Module | Trace) -> Trace:
    return source if isinstance(source, Trace) else trace(source)
