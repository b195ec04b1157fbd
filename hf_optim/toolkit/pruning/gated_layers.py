"""Linear layers with hard concrete gates in training: one per weight, or one per prunable group that a layer reads."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..topology.linear_layers import is_linear, weight_out_in
from ..topology.prunable_groups import PrunableGroups
from . import hard_concrete
from .noisy_layers import NoisyLayer, apply_linear, as_out_in, attach_noise


class Gates:
    """The gates of a layer; ``log_alpha``, float32 or float64, is a parameter of the layer.

    Attributes:
        name: name of the layer.
        layer: the layer.
        active: False computes as the linear layer without gates.
        sampled: True once a forward in training has sampled gates.
    """

    def __init__(self, name: str, layer: nn.Module, shape: tuple[int, ...], initial: float, temperature: float) -> None:
        weight = layer.get_parameter("weight")
        wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.name, self.temperature = name, temperature
        self.active, self.sampled = True, False
        self.layer: NoisyLayer = attach_noise(layer, self, log_alpha=torch.full(shape, initial, dtype=wide))

    @property
    def log_alpha(self) -> nn.Parameter:
        return self.layer.get_parameter("log_alpha")

    def expected_open(self, kept: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the expected number of weights with an open gate, and the number of all; ``kept`` as in ``sizes``."""
        sizes = self.sizes(kept)
        return (sizes * hard_concrete.open_probability(self.log_alpha, self.temperature)).sum(), sizes.sum()

    def sizes(self, kept: Mapping[str, Tensor]) -> Tensor:
        """Return how many of the weights that ``kept`` (masks by parameter name) keeps each gate controls."""
        raise NotImplementedError

    def fold(self, gates: Tensor) -> dict[str, Tensor]:
        """Multiply the weights by ``gates`` (of the shape of ``log_alpha``); return masks for the closed gates."""
        raise NotImplementedError

    def compute(self, layer: NoisyLayer, input: Tensor, gates: Tensor) -> Tensor:
        """Return the output of the layer with these gates."""
        raise NotImplementedError

    def __call__(self, layer: NoisyLayer, input: Tensor) -> Tensor:
        if not self.active:
            return apply_linear(layer, input, weight_out_in(layer))
        own = layer.get_parameter("log_alpha")
        if not layer.training:
            return self.compute(layer, input, hard_concrete.deterministic_gates(own))
        self.sampled = True
        return self.compute(layer, input, hard_concrete.sample_gates(own, self.temperature))


class WeightGates(Gates):
    """A gate per weight: ``y = x (z ∘ W)ᵀ + b``, sampled once per forward pass."""

    def __init__(self, name: str, layer: nn.Module, initial: float, temperature: float) -> None:
        super().__init__(name, layer, tuple(layer.get_parameter("weight").shape), initial, temperature)

    def compute(self, layer: NoisyLayer, input: Tensor, gates: Tensor) -> Tensor:
        weight = weight_out_in(layer)
        return apply_linear(layer, input, weight * as_out_in(layer, gates).to(weight.dtype))

    def sizes(self, kept: Mapping[str, Tensor]) -> Tensor:
        mask = kept.get(f"{self.name}.weight")
        alpha = self.log_alpha
        return torch.ones_like(alpha) if mask is None else mask.to(alpha.device, alpha.dtype)

    @torch.no_grad()
    def fold(self, gates: Tensor) -> dict[str, Tensor]:
        self.layer.weight.mul_(gates)
        return {f"{self.name}.weight": gates != 0}


class GroupGates(Gates):
    """A gate per prunable group: ``y = (z ∘ x) Wᵀ + b``, where ``z`` repeats the gate at each column of its group."""

    def __init__(self, model: nn.Module, groups: PrunableGroups, initial: float, temperature: float) -> None:
        layer = model.get_submodule(groups.consumer)
        self.groups = groups
        weights = {name: at for name, at in groups.entries.items() if name.endswith(".weight") and at[1].numel()}
        shapes = {name: model.get_parameter(name).shape for name in weights}
        # Only those of linear layers: other parameters of a group (T5's relative position bias) may serve other layers.
        self.entries = {n: at for n, at in weights.items() if len(shapes[n]) == 2 and _is_of_linear(model, n)}
        self.shapes = {name: tuple(shapes[name]) for name in self.entries}
        width = weight_out_in(layer).shape[1]
        self.group_of = torch.full((width,), len(groups), dtype=torch.int64)
        self.group_of[groups.columns] = torch.arange(len(groups)).unsqueeze(1)
        super().__init__(groups.consumer, layer, (len(groups),), initial, temperature)

    def column_factors(self, gates: Tensor) -> Tensor:
        """Return the factor of each column, ``[in]``; 1 for a column that is not part of a group."""
        self.group_of = self.group_of.to(gates.device)
        return torch.cat([gates, gates.new_ones(1)])[self.group_of]

    def compute(self, layer: NoisyLayer, input: Tensor, gates: Tensor) -> Tensor:
        return apply_linear(layer, input * self.column_factors(gates).to(input.dtype), weight_out_in(layer))

    def sizes(self, kept: Mapping[str, Tensor]) -> Tensor:
        alpha = self.log_alpha
        total = torch.zeros_like(alpha)
        for name, (dim, index) in self.entries.items():
            mask = kept.get(name)
            if mask is None:
                total += index.shape[1] * self.shapes[name][1 - dim]
            else:
                total += mask.to(alpha.device).sum(1 - dim)[index.to(alpha.device)].sum(1)
        return total

    @torch.no_grad()
    def fold(self, gates: Tensor) -> dict[str, Tensor]:
        weight_out_in(self.layer).mul_(self.column_factors(gates))
        closed = (gates == 0).nonzero().flatten().cpu()
        masks = {}
        for name, (dim, index) in self.entries.items():
            masks[name] = torch.ones(self.shapes[name], dtype=torch.bool)
            masks[name].index_fill_(dim, index[closed].flatten(), False)
        return masks


def _is_of_linear(model: nn.Module, parameter: str) -> bool:
    return is_linear(model.get_submodule(parameter.rpartition(".")[0]))
