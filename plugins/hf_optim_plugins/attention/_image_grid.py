"""The grid of patches that a vision transformer reads, as measured on the model."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from hf_optim import ModelError
from hf_optim.toolkit.attention import Band, hidden_states
from hf_optim.toolkit.modules import relative_difference

from ._attach import probe
from ._axial_pattern import patch_convolution


def configured_grid(config: PretrainedConfig) -> tuple[int, int] | None:
    """Return the rows and columns of patches by ``image_size`` and ``patch_size``; None for a model without these."""
    image, patch = (_pair(getattr(config, name, None)) for name in ("image_size", "patch_size"))
    if image is None or patch is None:
        return None
    return image[0] // patch[0], image[1] // patch[1]


def _pair(value: object) -> tuple[int, int] | None:
    if isinstance(value, int):
        return value, value
    if isinstance(value, (list, tuple)) and len(value) == 2 and all(isinstance(n, int) for n in value):
        return value[0], value[1]
    return None


def require_patches(model: PreTrainedModel, label: str) -> None:
    """Raise ``ModelError`` unless the model makes patches by exactly one convolution."""
    if patch_convolution(model) is None or configured_grid(model.config) is None:
        raise ModelError(
            f"{label}: {type(model).__name__} does not make patches of images by one convolution, so it has no grid "
            "of tokens; this architecture is not supported"
        )


def measured_grid(model: PreTrainedModel, inputs: dict[str, Tensor], label: str) -> tuple[int, int, int]:
    """Return the tokens before the patches, and the rows and columns of patches.

    Raises ``ModelError`` unless the tokens are those, row by row: without attention between tokens, a patch changes
    the one token that stands for it.
    """
    convolution = patch_convolution(model)
    assert convolution is not None
    pixels = next(value for value in inputs.values() if value.is_floating_point())
    with torch.no_grad():
        rows, columns = convolution(pixels).shape[-2:]
    patch = convolution.stride
    with probe(model, Band(0, 0)):
        before = hidden_states(model, inputs)
        first = before.shape[1] - rows * columns
        ordered = first >= 0
        for row, column in ((0, 0), (0, columns - 1), (rows - 1, columns - 1)) if ordered else ():
            changed = {name: value.clone() for name, value in inputs.items()}
            for value in changed.values():
                if value.is_floating_point():
                    value[..., row * patch[0], column * patch[1]] += 1.0
            after = hidden_states(model, changed)
            moved = [relative_difference(after[:, t], before[:, t]) > 0 for t in range(before.shape[1])]
            ordered &= moved == [t == first + row * columns + column for t in range(before.shape[1])]
    if not ordered:
        raise ModelError(
            f"{label}: the {before.shape[1]} tokens of {type(model).__name__} are not those of a grid of {rows} x "
            f"{columns} patches, row by row; this architecture is not supported"
        )
    return first, rows, columns
