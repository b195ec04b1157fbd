"""The specification in plain PyTorch: ``t[i] = 0`` wherever ``mask[i]`` is False, and no other bit changes.

Unlike ``t * mask``, which turns negative numbers into ``-0.0`` and leaves NaN for values that are not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.no_grad()
def zero_(tensors: Sequence[Tensor | None], masks: Sequence[Tensor]) -> None:
    """Zero each tensor where its mask is False, in place.

    Args:
        tensors: any shapes and dtypes; None is skipped.
        masks: bool, of the same shapes.
    """
    for tensor, mask in zip(tensors, masks, strict=True):
        if tensor is not None:
            tensor.masked_fill_(~mask, 0)
