"""A tensor as the bytes that a file holds of it."""

from __future__ import annotations

import torch
from torch import Tensor


def raw(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, to be written to a file or read into."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy's stubs on 3.10
