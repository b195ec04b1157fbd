"""Evaluation mode of a model, and the device of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of a model's first parameter, where it takes its inputs."""
    return next(model.parameters()).device


@contextmanager
def eval_mode(model: M) -> Iterator[M]:
    """Put a model in evaluation mode, without gradients. On exit both are restored, also if the body raises."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
