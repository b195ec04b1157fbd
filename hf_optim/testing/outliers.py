"""Synthetic outliers: scale a few activation channels of a small model by 20 to 100, as they are in large models.

From a few billion parameters on, some channels of a transformer's activations are that much larger than the others,
and one scale for all of them leaves the others no resolution. Small models have no such channels. Two exact
transformations add them without changing the function of the model, for a factor ``f > 1`` and a channel ``j``::

    norm -> linears       gain_j, bias_j times f       column j of every linear that reads the norm divided by f
    linear -> linear      row r and its bias times f   the columns that read row r divided by f

The first needs a norm whose output goes to linears only, as in pre-norm models. In a post-norm model (BERT) it also
goes to the residual sum, so that only the second is exact there: value -> attention output. The second needs a path
that preserves scales: value -> output projection, up -> down, fc1 -> fc2 through ReLU.
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
class SyntheticOutliers:
    """The outliers that were added.

    Attributes:
        inputs: name of the linear -> int64 ``[n]``, its input channels that were scaled up.
        factor: their size, in multiples of the median channel.
    """

    inputs: dict[str, Tensor]
    factor: float


def add_synthetic_outliers(
    model: PreTrainedModel,
    channels: int = 1,
    factor: float = 40.0,
    sample: Mapping[str, Tensor] | None = None,
    norms: bool = True,
    pairs: bool = True,
) -> SyntheticOutliers:
    """Scale up a few input channels of the model's linears in place, without changing its outputs.

    For each input, the least important channels are chosen (by their size times the norm of the weight columns that
    read them), because outliers also cost weight precision: a column divided by ``f`` uses few of the codes of its row,
    which costs at most that channel. So 8-bit weights alone lose little, as in models with natural outliers.

    Args:
        model: any transformer with floating-point weights.
        channels: number of outlier channels per input.
        factor: their size, in multiples of the median channel of the input (root mean square).
        sample: a batch to measure the channels on; None uses a few tokens of the model's dummy inputs.
        norms: add outliers to the inputs that come from a norm.
        pairs: add outliers to the inputs that come from another linear.

    Raises ``ValueError`` for a model in which neither is possible.
    """
    trace = topology.trace(model)
    sizes = _channel_rms(model, sample)
    inputs: dict[str, Tensor] = {}
    for group in topology.find_norm_groups(trace) if norms else ():
        if group.exclusive and group.linears:
            size = sizes[next(iter(group.linears))]
            chosen, scale = _choose_channels(size, _column_norms(group.linears.values()), channels, factor)
            folding.move_norm_scale_(group, scale)
            inputs |= dict.fromkeys(group.linears, chosen)
    for pair in topology.find_linear_pairs(trace) if pairs else ():
        if pair.scalable:
            size = folding.max_over_columns(pair, sizes[pair.consumer])
            norms_of_columns = _column_norms([pair.consumer_module])[pair.columns].norm(dim=1)
            rows, scale = _choose_channels(size, norms_of_columns, channels, factor)
            folding.move_pair_scale_(pair, scale)
            inputs[pair.consumer] = pair.columns[rows].flatten().sort().values
    if not inputs:
        raise ValueError(f"{type(model).__name__} has no norm that only linears read and no scalable pair of linears")
    return SyntheticOutliers(inputs, factor)


class _MeanSquare(InputObserver[tuple[Tensor, int]]):
    """Observes the sum of squares per channel, float64, and the number of tokens."""

    def update(self, name: str, inputs: Tensor) -> None:
        tokens = inputs.reshape(-1, inputs.shape[-1]).double()
        total, count = self.found.get(name, (0.0, 0))
        self.found[name] = (total + tokens.square().sum(0), count + len(tokens))


def _channel_rms(model: PreTrainedModel, sample: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Return the root mean square of each input channel of each linear, float64 ``[in]``."""
    with _MeanSquare(topology.linears(model)) as found, eval_mode(model):
        model(**(sample or topology.dummy_inputs(model)))
    return {name: (total / count).sqrt() for name, (total, count) in found.items()}


def _choose_channels(size: Tensor, column_norms: Tensor, channels: int, factor: float) -> tuple[Tensor, Tensor]:
    """Return the least important channels ``[n]``, and the divisor of each channel ``[K]``."""
    # A channel that is almost zero on the sample would stay so, and is excluded.
    median = float(size[size > 0].median())
    score = torch.where(size < 0.1 * median, torch.inf, size * column_norms)
    chosen = score.topk(channels, largest=False).indices.sort().values
    scale = torch.ones_like(size)
    scale[chosen] = (size[chosen] / (factor * median)).clamp_max(1.0)
    return chosen, scale


def _column_norms(linears: Iterable[nn.Module]) -> Tensor:
    """Return the norm of each column over all linears that read one input, float64 ``[in]``."""
    return torch.cat([weight_out_in(linear).detach().double() for linear in linears]).norm(dim=0).clamp_min(1e-12)
