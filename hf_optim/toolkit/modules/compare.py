"""Compare the outputs of two models on the same inputs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...errors import ModelError
from .modes import eval_mode


def main_output(model: PreTrainedModel, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return the logits, or else the first output, in float64; in evaluation mode and without gradients.

    The mode of each module is restored.
    """
    with eval_mode(model):
        outputs = model(**inputs)
    logits = getattr(outputs, "logits", None)
    return (logits if logits is not None else outputs[0]).double()


def relative_difference(values: Tensor, reference: Tensor) -> float:
    """Return the largest difference, relative to the largest value of ``reference``."""
    scale = reference.abs().max().clamp_min(torch.finfo(reference.dtype).tiny)
    return float((values - reference).abs().max() / scale)


def output_difference(first: PreTrainedModel, second: PreTrainedModel, inputs: Mapping[str, Tensor]) -> float:
    """Return the largest difference between the outputs of two models, relative to the largest output of the first.

    Raises ``ModelError`` if the outputs differ in shape.
    """
    one, two = main_output(first, inputs), main_output(second, inputs)
    if one.shape != two.shape:
        raise ModelError(
            f"the output of {type(first).__name__} has shape {tuple(one.shape)}, that of {type(second).__name__} "
            f"{tuple(two.shape)}"
        )
    return relative_difference(two, one)


def rounding_tolerance(model: PreTrainedModel) -> float:
    """Return the ``output_difference`` that rounding in the dtype of the model can explain."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return max(1e-4, 16 * torch.finfo(dtype).eps)
