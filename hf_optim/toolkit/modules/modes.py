"""Evaluation mode, and the device a model takes its inputs on."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its inputs."""
    return next(model.parameters()).device


@contextmanager
def eval_mode(model: nn.Module):
    """The model in eval mode without gradients; both restored afterwards, also when the body raises."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield model
    finally:
        for module, mode in modes:
            module.training = mode
