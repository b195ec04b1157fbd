"""What reaches what in a model: outputs for inputs that are changed at one end."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..modules import eval_mode, relative_difference


def hidden_states(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the last hidden states ``[1, T, d]`` of the model under its head, in evaluation mode."""
    body = model.base_model
    extra = {"use_cache": False} if "use_cache" in inspect.signature(body.forward).parameters else {}
    with eval_mode(body):
        return body(**inputs, **extra)[0].double()


def perturbed(inputs: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """Return the inputs with another token, or corner of the picture, at the first (0) or last (-1) position."""
    name, value = next(iter(inputs.items()))
    value = value.clone()
    if value.is_floating_point():
        value[..., position, position] += 1.0
    else:
        value[:, position] = value[:, 1]
    return {**inputs, name: value}


def attends_to_the_far_end(model: PreTrainedModel, inputs: dict[str, Tensor]) -> bool:
    """Return True if the first input position influences the last output position, or the last the first."""
    tolerance = _rounding(model)
    before = hidden_states(model, inputs)
    return any(
        relative_difference(hidden_states(model, perturbed(inputs, here))[:, there], before[:, there]) > tolerance
        for here, there in ((0, -1), (-1, 0))
    )


def is_causal(model: PreTrainedModel, inputs: dict[str, Tensor], full: Tensor) -> bool:
    """Return True if the first position does not see the last one; ``full`` are the hidden states for ``inputs``."""
    return relative_difference(hidden_states(model, perturbed(inputs, -1))[:, 0], full[:, 0]) <= _rounding(model)


def _rounding(model: PreTrainedModel) -> float:
    """Return the relative difference that does not count as an influence.

    Experts process tokens in groups, and a matrix product rounds depending on its size.
    """
    return max(1e-5, 2 * torch.finfo(model.dtype).eps)
