"""Linear layers that draw noise while they train: their class is changed in place, their parameters keep their names.

What the noise learns (a variance, a gate) is a parameter of the layer, so that the optimizer, gradient clipping and
data-parallel training find it; no state dict has it, so a checkpoint of the model is an ordinary one.
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
from .masked_layers import unsupported_reason

# Of Adam, for what the noise learns: a million gates have gradients of 1e-9, which the usual 1e-8 would drown.
ADAM_EPSILON = 1e-15

Noise = Callable[["NoisyLayer", Tensor], Tensor]


class NoisyLayer(nn.Module):
    """A linear layer whose forward is ``noise(layer, input)``: made in place by ``attach_noise``, undone by ``detach_noise``.

    Attributes:
        noise: computes the layer's output ``[..., out]`` from its input ``[..., in]``.
        learned: names of the parameters that belong to the noise.
        former: the class it had.
    """

    noise: Noise
    learned: tuple[str, ...]
    former: type[nn.Module]
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
    """``x Wᵀ + b`` with another weight ``[out, in]`` and the layer's bias; input ``[..., in]``."""
    return F.linear(input, weight, cast("Tensor | None", layer.bias))


def attach_noise(layer: nn.Module, noise: Noise, **learned: Tensor) -> NoisyLayer:
    """Make a linear layer draw noise, in place; hooks and references to it stay valid.

    Args:
        layer: an ``nn.Linear`` or ``Conv1D``; ``ValueError`` for one with a forward of its own
            (``sparse_training.obstacle``).
        noise: see ``NoisyLayer``.
        learned: parameters of the noise by name, with their first values; put on the layer's device.
    """
    if reason := unsupported_reason(layer):
        raise ValueError(reason)
    former = type(layer)
    layer.__class__ = NoisyConv1D if isinstance(layer, Conv1D) else NoisyLinear
    made = cast(NoisyLayer, layer)
    made.__dict__.update(noise=noise, learned=tuple(learned), former=former)
    for name, value in learned.items():
        made.register_parameter(name, nn.Parameter(value.to(made.weight.device)))
    return made


def detach_noise(layer: NoisyLayer) -> nn.Module:
    """Undo ``attach_noise``; the weight stays as it is."""
    for name in layer.learned:
        layer._parameters.pop(name)
    former = layer.former
    for name in ("noise", "learned", "former"):
        layer.__dict__.pop(name)
    layer.__class__ = former  # type: ignore[assignment]
    return layer


def noise_parameters(layers: Mapping[str, NoisyLayer]) -> dict[str, nn.Parameter]:
    """What the noise of these layers learns, as ``layer name.parameter name``."""
    return {f"{n}.{p}": cast(nn.Parameter, layer._parameters[p]) for n, layer in layers.items() for p in layer.learned}


def store_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Put what the noise learns into a state that is saved with checkpoints; the tensors are the parameters."""
    vars(state).update(noise_parameters(layers))


@torch.no_grad()
def load_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Take back what ``store_noise_parameters`` put there, where a checkpoint that was read has put other tensors in its place."""
    for key, parameter in noise_parameters(layers).items():
        saved = getattr(state, key)
        if saved is not parameter:
            parameter.copy_(saved)
            setattr(state, key, parameter)


def clear_noise_parameters(state: SimpleNamespace, layers: Mapping[str, NoisyLayer]) -> None:
    """Undo ``store_noise_parameters``."""
    for key in noise_parameters(layers):
        vars(state).pop(key, None)


def as_out_in(layer: nn.Module, stored: Tensor) -> Tensor:
    """A tensor of the shape of the layer's weight the way round ``[out, in]``: a ``Conv1D`` stores ``[in, out]``."""
    return stored.T if isinstance(layer, Conv1D) else stored


def lower_adam_epsilon(optimizer: Any, layers: Mapping[str, NoisyLayer]) -> None:
    """Let an optimizer of Adam's kind see the small gradients of what the noise learns; others stay as they are."""
    ours = {id(parameter) for parameter in noise_parameters(layers).values()}
    for group in getattr(optimizer, "param_groups", ()):
        own = [id(parameter) in ours for parameter in group["params"]]
        if own and all(own) and isinstance(group.get("eps"), float):
            group["eps"] = ADAM_EPSILON
