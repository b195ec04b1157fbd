"""Feed-forward layers: which linear layers they are made of, and which activation stands between them.

    y = W_down act(W_up x + b_up) + b_down             or, gated,     y = W_down (act(W_gate x) * W_up x) + b_down

They are found on a trace, by what the operations between the linear layers compute: these are re-executed on random
numbers, and compared with the activations of transformers. So neither classes nor names of an architecture matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from .block_lists import block_of, blocks
from .graph import Trace
from .layer_pairs import LinearPair, find_linear_pairs
from .prunable_groups import mixes_tokens, upstream
from .reexecution import NotReexecutable, Reexecution, is_close
from .routing import find_routing


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a linear layer: ``index`` int64 ``[neurons]``, the row that belongs to each neuron."""

    name: str
    index: Tensor


@dataclass(frozen=True, eq=False)
class FeedForward:
    """A feed-forward layer of one block. Its length is the number of neurons.

    Attributes:
        down: name of the linear layer that reads the neurons.
        columns: int64 ``[neurons]``, its column that reads each neuron.
        up: the rows that compute the neurons, or what the gate multiplies.
        gate: the rows that the activation is applied to; None without a gate, where it is applied to ``up``. A fused
            projection holds both.
        activation: key of transformers' ``ACT2FN``.
    """

    down: str
    columns: Tensor
    up: Rows
    gate: Rows | None
    activation: str

    def __len__(self) -> int:
        return len(self.columns)

    @property
    def producers(self) -> tuple[str, ...]:
        """Names of the linear layers that read the input of the feed-forward layer."""
        return tuple(dict.fromkeys([self.up.name, *([self.gate.name] if self.gate else [])]))


def find_feed_forwards(trace: Trace) -> tuple[list[FeedForward], dict[str, list[str]]]:
    """Return the feed-forward layers in the blocks of a model, in execution order, and what is none, by reason.

    The second result has names of linear layers that read the neurons of something that looks like a feed-forward
    layer, but whose activation is unknown, whose output is not all read, or whose projections do not read one input.
    Layers with tied weights or that run more than once, and experts of a mixture, are in neither.
    """
    inside = blocks(trace)
    routers = find_routing(trace, [block.name for block in inside])
    found: list[FeedForward] = []
    refused: dict[str, list[str]] = {}
    for pair in find_linear_pairs(trace):
        block = block_of(inside, pair.producer)
        names = {pair.producer, pair.consumer, *(partner.name for partner in pair.permutable_with)}
        if block is None or not block.holds(pair.consumer) or names & set(routers):
            continue
        if pair.groups.unique().numel() != 1 or pair.repeat != 1:
            continue
        try:
            layer = _feed_forward(trace, pair)
        except NotReexecutable:
            continue
        if isinstance(layer, str):
            refused.setdefault(layer, []).append(pair.consumer)
        elif layer is not None:
            found.append(layer)
    return found, refused


def _feed_forward(trace: Trace, pair: LinearPair) -> FeedForward | str | None:
    """Return the layer of a pair, why it is none, or None for something else, such as attention."""
    target = trace.calls_of(pair.consumer)[0].reads[0]
    source = trace.calls_of(pair.producer)[0].writes[0]
    ops, sources = upstream(trace, target)
    if mixes_tokens(trace, ops, source, target):
        return None
    rows = [Rows(pair.producer, pair.rows), *(Rows(partner.name, partner.rows) for partner in pair.permutable_with)]
    outputs = {part.name: trace.calls_of(part.name)[0].writes[0] for part in rows}
    if len(rows) > 2 or not set(sources) <= set(outputs.values()):
        return "its neurons depend on more than a gate and an up projection"
    if len({trace.calls_of(part.name)[0].reads[0] for part in rows}) > 1:
        return "its gate and its up projection read different inputs"
    columns = pair.columns[:, 0]
    if len(columns) != _width(pair.consumer_module) or any(
        len(rows) * len(part.index) != _outputs(trace.modules[part.name]) * len(outputs) for part in rows
    ):
        return "only a part of its projections belongs to its neurons"
    # Wide enough to tell activations apart that differ far from zero only.
    generator = torch.Generator().manual_seed(41)
    given = {
        value: 4 * torch.randn(trace.shapes[value], dtype=torch.float64, generator=generator)
        for value in outputs.values()
    }
    result = Reexecution(trace, ops, seed=42).run(given)[target][..., columns]
    parts = [given[outputs[part.name]][..., part.index] for part in rows]
    for name, function in _activations(trace.model):
        if len(rows) == 1:
            if _equals(function, parts[0], None, result):
                return FeedForward(pair.consumer, columns, rows[0], None, name)
        else:
            for gate, up in ((1, 0), (0, 1)):
                if _equals(function, parts[gate], parts[up], result):
                    return FeedForward(pair.consumer, columns, rows[up], rows[gate], name)
    return "between its linear layers is none of transformers' activations"


def _equals(function: Any, x: Tensor, factor: Tensor | None, result: Tensor) -> bool:
    out = function(x)
    return is_close(out if factor is None else out * factor, result)


def _activations(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield the activations of transformers that need no settings, first those that the configuration names."""
    config: Any = getattr(model, "config", None)
    settings = config.get_text_config().to_dict().values() if config is not None else ()
    named = [value for value in settings if isinstance(value, str) and value in ACT2FN]
    for name in dict.fromkeys([*named, *ACT2FN]):
        try:
            function = ACT2FN[name]
            function(torch.zeros(2, dtype=torch.float64))
        except Exception:  # some need a package or arguments
            continue
        if not any(True for _ in function.parameters()):
            yield name, function


def _width(linear: nn.Module) -> int:
    weight: Any = linear.weight
    return int(weight.shape[1] if isinstance(linear, nn.Linear) else weight.shape[0])


def _outputs(linear: nn.Module) -> int:
    weight: Any = linear.weight
    return int(weight.shape[0] if isinstance(linear, nn.Linear) else weight.shape[1])
