"""Linear layers with noise during training.

Their class is changed in place, and their parameters keep their names. What the noise learns (a variance, a gate) is a
parameter of the layer, for the optimizer, gradient clipping and data-parallel training. No state dict contains it, so
checkpoints of the model do not change.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..modules.hidden_parameters import hide_parameters
from ..modules.swap_class import restore_class, swap_class
from .masked_layers import unsupported_reason

# Adam's epsilon for the parameters of the noise: with a million gates gradients are about 1e-9, and the default epsilon
# of 1e-8 would dominate them.
ADAM_EPSILON = 1e-15

Noise = Callable[["NoisyLayer", Tensor], Tensor]


class NoisyLayer(nn.Module):
    """A linear layer whose forward is ``noise(layer, input)``: made by ``attach_noise``, in place.

    Attributes:
        noise: computes the layer's output ``[..., out]`` from its input ``[..., in]``.
        learned: names of the parameters that belong to the noise.
    """

    noise: Noise
    learned: tuple[str, ...]
    weight: Any  # an nn.Parameter; the two kinds declare it differently

    def forward(self, input: Tensor) -> Tensor:
        return self.noise(self, input)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with hide_parameters(self, self.learned):
            super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        with hide_parameters(self, self.learned):
            super()._load_from_state_dict(*args, **kwargs)


class NoisyLinear(NoisyLayer, nn.Linear):
    """An ``nn.Linear`` with noise; weight ``[out, in]``."""


class NoisyConv1D(NoisyLayer, Conv1D):
    """A ``Conv1D`` with noise; weight ``[in, out]``."""


def apply_linear(layer: nn.Module, input: Tensor, weight: Tensor) -> Tensor:
    """Compute ``x Wᵀ + b`` with the given weight ``[out, in]`` and the layer's bias; input ``[..., in]``."""
    return F.linear(input, weight, cast("Tensor | None", layer.bias))


def attach_noise(layer: nn.Module, noise: Noise, **learned: Tensor) -> NoisyLayer:
    """Turn a linear layer into a ``NoisyLayer`` in place, and return it; hooks and references to it stay valid.

    Args:
        layer: an ``nn.Linear`` or ``Conv1D``.
        noise: computes the output; see ``NoisyLayer``.
        learned: initial values of the parameters of the noise, by name; moved to the device of the layer.

    Raises:
        ValueError: the layer has its own forward (``masked_layers.unsupported_reason``).
    """
    if reason := unsupported_reason(layer):
        raise ValueError(reason)
    kind: type[NoisyLayer] = NoisyConv1D if isinstance(layer, Conv1D) else NoisyLinear
    noisy = swap_class(layer, kind, noise=noise, learned=tuple(learned))
    for name, value in learned.items():
        noisy.register_parameter(name, nn.Parameter(value.to(noisy.weight.device)))
    return noisy


def detach_noise(layer: NoisyLayer) -> nn.Module:
    """Undo ``attach_noise``, and return the layer; its weight does not change."""
    for name in layer.learned:
        layer._parameters.pop(name)
    return restore_class(layer)


def noise_parameters(layers: Mapping[str, NoisyLayer]) -> dict[str, nn.Parameter]:
    """Return the parameters of the noise of these layers, as ``layer name.parameter name``."""
    return {f"{n}.{p}": cast(nn.Parameter, layer._parameters[p]) for n, layer in layers.items() for p in layer.learned}


def store_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Store the parameters of the noise, not copies, in a state that is saved with checkpoints."""
    vars(state).update(noise_parameters(layers))


@torch.no_grad()
def load_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Load the parameters of the noise from a state in which a checkpoint has replaced the tensors stored there."""
    for key, parameter in noise_parameters(layers).items():
        saved = getattr(state, key)
        if saved is not parameter:
            parameter.copy_(saved)
            setattr(state, key, parameter)


def clear_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Remove what ``store_noise_parameters`` stored."""
    for key in noise_parameters(layers):
        vars(state).pop(key, None)


def as_out_in(layer: nn.Module, stored: Tensor) -> Tensor:
    """Return a tensor of the shape of the layer's weight as ``[out, in]``; a ``Conv1D`` stores ``[in, out]``."""
    return stored.T if isinstance(layer, Conv1D) else stored


def lower_adam_epsilon(optimizer: Any, layers: Mapping[str, NoisyLayer]) -> None:
    """Lower the epsilon of an Adam-like optimizer for the parameters of the noise; other optimizers do not change."""
    ours = {id(parameter) for parameter in noise_parameters(layers).values()}
    for group in getattr(optimizer, "param_groups", ()):
        own = [id(parameter) in ours for parameter in group["params"]]
        if own and all(own) and isinstance(group.get("eps"), float):
            group["eps"] = ADAM_EPSILON
