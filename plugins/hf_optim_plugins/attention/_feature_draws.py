"""Draws of random features: which one a model has is told by numbers that are saved with it.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ._recomputed import Recomputed

FORWARDS = 64  # in training, whose features are known until their backward


def generator_for(*numbers: int) -> torch.Generator:
    """Return a generator on the CPU that depends on these numbers alone: a seed, a layer, the number of a draw."""
    seed = 0
    for number in numbers:
        seed = (seed * 6364136223846793005 + number + 1442695040888963407) % 2**63
    return torch.Generator("cpu").manual_seed(seed)


def gaussian_features(heads: int, features: int, width: int, generator: torch.Generator) -> Tensor:
    """Return ``[heads, features, width]`` float64 with independent entries of variance 1."""
    return torch.randn(heads, features, width, generator=generator, dtype=torch.float64, device="cpu")


def orthogonal_features(heads: int, features: int, width: int, generator: torch.Generator, norms: str) -> Tensor:
    """Return ``[heads, features, width]`` float64: rows of Gaussian direction, orthogonal in each block of ``width``.

    ``norms``: ``chi``, those of other Gaussian vectors; ``fixed``, all sqrt(width).
    """
    blocks = -(-features // width)
    q, r = torch.linalg.qr(gaussian_features(heads * blocks, width, width, generator))
    # Signs of the diagonal of R make the distribution uniform over the orthogonal group.
    q = q * torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]
    rows = q.mT.reshape(heads, blocks * width, width)[:, :features]
    if norms == "fixed":
        return rows * math.sqrt(width)
    return rows * gaussian_features(heads, features, width, generator).norm(dim=-1, keepdim=True)


class Drawn(nn.Module):
    """Base of random features that are drawn again while a model trains.

    Attributes:
        draws: int64 ``[2]``: the number of the draw, and how many forwards in training it has been used for.
        draw_every: forwards in training after which features are drawn again; 0: never.
        forwards: the features that forwards in training had.
    """

    draws: Tensor

    def __init__(self, every: int) -> None:
        super().__init__()
        self.draw_every, self.forwards = every, Recomputed(FORWARDS)
        self.register_buffer("draws", torch.zeros(2, dtype=torch.int64))

    def draw(self, number: int) -> None:
        """Set the features to draw ``number``; 0 is the first."""
        raise NotImplementedError

    def count(self) -> None:
        """Count a forward in training, before it is computed; draw again if the features have been used enough."""
        number, used = self.draws.tolist()
        if used >= self.draw_every:
            number, used = number + 1, 0
            self.draw(number)
        self.draws = torch.tensor([number, used + 1], device=self.draws.device)


def count_forward(model: nn.Module) -> None:
    """Count a forward of a model, in training, for each of its random features. In evaluation nothing is counted."""
    if model.training and torch.is_grad_enabled():
        for module in model.modules():
            if getattr(module, "draw_every", 0):  # not an ``isinstance``: code beside a checkpoint has its own class
                module.count()  # type: ignore[operator]


def fill_(target: Tensor, values: Tensor) -> None:
    """Copy values into a parameter or buffer, unless it is on the meta device."""
    if not target.is_meta:
        with torch.no_grad():
            target.copy_(values)
