"""Planted outliers: a few channels of a small model made 20 to 100 times larger, as they are in large models.

From a few billion parameters on, some channels of a transformer's activations are that much larger than the others,
and one scale for all of them leaves the others no resolution. Small models have no such channels. Here they get them
without a change of their function, by two exact rewritings, for a factor ``f > 1`` and a channel ``j``::

    norm -> linears       gain_j, bias_j times f       column j of every linear that reads the norm divided by f
    linear -> linear      row r and its bias times f   the columns that read row r divided by f

The first needs a norm that nothing but linears reads, as in pre-norm models. In a post-norm model (BERT) the residual
sum reads it too, and only the second is exact there: value -> attention output. The second needs a path on which scales
pass: value -> output projection, up -> down, fc1 -> fc2 through ReLU.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..toolkit import topology
from ..toolkit.modules.modes import eval_mode
from ..toolkit.permutation import folding
from ..toolkit.statistics.observers import InputObserver
from ..toolkit.topology.linear_layers import weight_out_in


@dataclass(frozen=True)
class Planted:
    """Where outliers are now: name of the linear -> int64 ``[n]``, the input channels that were made larger."""

    inputs: dict[str, Tensor]
    factor: float


def plant_outliers(
    model: PreTrainedModel,
    channels: int = 1,
    factor: float = 40.0,
    sample: Mapping[str, Tensor] | None = None,
    norms: bool = True,
    pairs: bool = True,
) -> Planted:
    """Make a few input channels of the model's linears larger, in place; its outputs stay as they are.

    Of each input those channels are taken that matter the least (their size times the length of the columns that read
    them): the weights pay for outliers, too. A column divided by ``f`` keeps few of the codes of its row's grid, and
    what that can cost is at most the channel. So 8-bit weights alone lose little, as in models that grew outliers.

    Args:
        model: any transformer with floating-point weights.
        channels: how many channels of each input.
        factor: how large they become, in multiples of the median channel of their input (root mean square).
        sample: a batch to measure the channels on; None for a few tokens of the model's dummy inputs.
        norms: plant into the inputs that come from a norm.
        pairs: plant into the inputs that come from another linear.

    Raises ``ValueError`` for a model that allows neither.
    """
    trace = topology.trace(model)
    sizes = _sizes(model, sample)
    inputs: dict[str, Tensor] = {}
    for group in topology.find_norm_groups(trace) if norms else ():
        if group.exclusive and group.linears:
            size = sizes[next(iter(group.linears))]
            chosen, scale = _choose(size, _lengths(group.linears.values()), channels, factor)
            folding.move_norm_scale_(group, scale)
            inputs |= dict.fromkeys(group.linears, chosen)
    for pair in topology.find_linear_pairs(trace) if pairs else ():
        if pair.scalable:
            size = folding.max_over_columns(pair, sizes[pair.consumer])
            length = _lengths([pair.consumer_module])[pair.columns].norm(dim=1)
            rows, scale = _choose(size, length, channels, factor)
            folding.move_pair_scale_(pair, scale)
            inputs[pair.consumer] = pair.columns[rows].flatten().sort().values
    if not inputs:
        raise ValueError(f"{type(model).__name__} has no norm that only linears read and no scalable pair of linears")
    return Planted(inputs, factor)


class _MeanSquare(InputObserver[tuple[Tensor, int]]):
    """Sum of squares per channel, float64, and how many tokens it is over."""

    def update(self, name: str, inputs: Tensor) -> None:
        rows = inputs.reshape(-1, inputs.shape[-1]).double()
        total, count = self.found.get(name, (0.0, 0))
        self.found[name] = (total + rows.square().sum(0), count + len(rows))


def _sizes(model: PreTrainedModel, sample: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Root mean square of each input channel of each linear, float64 ``[in]``."""
    with _MeanSquare(topology.linears(model)) as found, eval_mode(model):
        model(**(sample or topology.dummy_inputs(model)))
    return {name: (total / count).sqrt() for name, (total, count) in found.items()}


def _choose(size: Tensor, length: Tensor, channels: int, factor: float) -> tuple[Tensor, Tensor]:
    """The channels ``[n]`` that matter the least, and what all channels ``[K]`` are to be divided by."""
    # A channel that is next to silent on the sample would stay so: it is no candidate.
    median = float(size[size > 0].median())
    score = torch.where(size < 0.1 * median, torch.inf, size * length)
    chosen = score.topk(channels, largest=False).indices.sort().values
    scale = torch.ones_like(size)
    scale[chosen] = (size[chosen] / (factor * median)).clamp_max(1.0)
    return chosen, scale


def _lengths(linears: Iterable[nn.Module]) -> Tensor:
    """The length of each column of linears that read one input, float64 ``[in]``."""
    return torch.cat([weight_out_in(linear).detach().double() for linear in linears]).norm(dim=0).clamp_min(1e-12)
