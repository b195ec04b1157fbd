"""Copies of dense weights that become experts, and noise that makes them differ."""

from __future__ import annotations

import torch
from torch import Tensor


def copies(weight: Tensor, experts: int) -> Tensor:
    """Return ``weight`` ``[...]`` as ``[experts, ...]``, in its own memory."""
    return weight.unsqueeze(0).repeat(experts, *[1] * weight.dim())


def perturb_(weights: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """Add N(0, (noise * std(weights))^2) to ``weights`` in place, except to zeros, so that pruned stays pruned."""
    drawn = torch.randn(weights.shape, generator=generator).to(weights)
    return weights.add_(drawn * (noise * weights.float().std()).to(weights) * (weights != 0))
