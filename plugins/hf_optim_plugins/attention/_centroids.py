"""Spherical k-means: fitted to a set of directions at once, and followed batch by batch.

A point belongs to the centroid of largest cosine. A centroid is the direction of the mean of its points.

This file is stored beside checkpoints, so it imports only torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ._recomputed import Recomputed

STEPS = 10  # of k-means
CENTROIDS_KEPT = 4  # in training, whose centroids are known until their backward
POINTS = 4096  # of each head, to which centroids are fitted at most


def directions(part: Tensor, normalize: str) -> Tensor:
    """Return ``[..., D]`` with unit norm, in float32 or wider.

    ``l2`` divides by the norm; ``layer_norm`` subtracts the mean of the D numbers first, as layer normalization without
    weights does, up to the factor sqrt(D).
    """
    wide = part if part.dtype == torch.float64 else part.float()
    if normalize == "layer_norm":
        wide = wide - wide.mean(-1, keepdim=True)
    return functional.normalize(wide, dim=-1)


def fitted(points: Tensor, clusters: int, seed: int, steps: int = STEPS) -> Tensor:
    """Return the centroids ``[G, C, D]`` of unit points ``[G, N, D]``, by k-means from points drawn with ``seed``.

    Where there are fewer points than clusters, the others are random directions. A cluster that loses its points keeps
    its centroid.
    """
    heads, count, width = points.shape
    generator = torch.Generator().manual_seed(seed)
    made = functional.normalize(torch.randn(heads, clusters, width, generator=generator, dtype=torch.float64), dim=-1)
    centroids = made.to(points)
    chosen = torch.stack([torch.randperm(count, generator=generator)[:clusters] for _ in range(heads)])
    index = chosen.to(points.device)[..., None].expand(-1, -1, width)
    centroids[:, : chosen.shape[1]] = points.gather(1, index)
    for _ in range(steps if count else 0):
        sums, counts = totals(points, centroids, None)
        centroids = torch.where(counts[..., None] > 0, functional.normalize(sums, dim=-1), centroids)
    return centroids


def totals(points: Tensor, centroids: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the sums ``[G, C, D]`` and counts ``[G, C]`` of the points ``[G, N, D]`` that belong to each centroid.

    ``valid``: bool ``[G, N]`` or None. Sums are products of matrices, so that they are the same in each run.
    """
    nearest = (points @ centroids.to(points).transpose(1, 2)).argmax(-1, keepdim=True)
    hot = points.new_zeros(*points.shape[:2], centroids.shape[1]).scatter_(2, nearest, 1.0)
    if valid is not None:
        hot = hot * valid[..., None]
    return hot.transpose(1, 2) @ points, hot.sum(1)


class Centroids(nn.Module):
    """Centroids of one attention, and their moving average in training.

    A batch changes them when the next one begins, or when training pauses or they are saved. A forward that is computed
    again in the backward (gradient checkpointing) finds those of the first time, if it is one of the last
    ``CENTROIDS_KEPT``. With ``torch.distributed`` the statistics of a batch are summed over all ranks, each of which
    must compute the same number of batches.

    Attributes:
        weight: buffer ``[G, C, D]``, of unit norm.
        fits: buffer, int64: the batches that were learned from; centroids that were never fitted are fitted to the
            first batch.
        commitment: ``mean |x - centroid|^2`` of the last forward in training, with its gradient; None elsewhere.
        collected: lists of directions ``[G, N, D]`` while samples are taken; None else.
    """

    weight: Tensor
    fits: Tensor

    def __init__(self, heads: int, clusters: int, width: int, decay: float, seed: int) -> None:
        super().__init__()
        self.shape, self.decay, self.seed = (heads, clusters, width), decay, seed
        self.register_buffer("weight", torch.empty(heads, clusters, width, dtype=torch.float32))
        self.register_buffer("fits", torch.zeros((), dtype=torch.int64))
        self.commitment: Tensor | None = None
        self.collected: list[Tensor] | None = None
        self._pending: tuple[Tensor, Tensor] | None = None
        self._exact: Tensor | None = None
        self._fitted = False
        self._forwards = Recomputed(CENTROIDS_KEPT)
        self._used: Tensor | None = None  # the centroids of the last forward in training
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw random directions."""
        self._pending, self._exact, self._fitted = None, None, False
        if not self.weight.is_meta:
            with torch.no_grad():
                nothing = self.weight.new_zeros(self.shape[0], 0, self.shape[2])
                self.weight.copy_(fitted(nothing, self.shape[1], self.seed))
                self.fits.zero_()

    @torch.no_grad()
    def set(self, centroids: Tensor) -> None:
        """Take fitted centroids ``[G, C, D]``."""
        self._pending, self._exact, self._fitted, self._used = None, None, True, None
        self.weight.copy_(centroids)
        self.fits.fill_(1)

    def observe(self, points: Tensor, valid: Tensor | None, with_loss: bool) -> None:
        """Learn from the directions ``[G, N, D]`` of a batch in training; ``valid``: bool ``[G, N]`` or None.

        To be called before the centroids are used. Does nothing in evaluation. While a backward computes a forward
        again (gradient checkpointing), the loss is computed with it and nothing is learned.
        """
        if not self.training:
            return
        self._used = used = self._forwards.value(lambda: self._learn(points, valid))
        loss = self._distance(points, valid, used) if with_loss and torch.is_grad_enabled() else None
        if torch._C._current_graph_task_id() == -1:
            self.commitment = loss

    @torch.no_grad()
    def _learn(self, points: Tensor, valid: Tensor | None) -> Tensor:
        """Learn from a batch when the next one begins; return the centroids ``[G, C, D]`` for this one."""
        self.settle()
        if not self._fitted:
            self._fitted = bool(self.fits)
            if not self._fitted:
                self._fit(points, valid)
        sums, counts = totals(points, self.weight, valid)
        if _ranks() > 1:
            for part in (sums, counts):
                torch.distributed.all_reduce(part)
        self._pending = sums, counts
        return self.weight.clone()

    @staticmethod
    def _distance(points: Tensor, valid: Tensor | None, weight: Tensor) -> Tensor:
        """Return the mean squared difference of points and their centroids, of ``weight``."""
        weight = weight.to(points)
        nearest = (points.detach() @ weight.transpose(1, 2)).argmax(-1, keepdim=True)
        far = (points - weight.gather(1, nearest.expand(-1, -1, weight.shape[2]))).square().mean(-1)
        return far.mean() if valid is None else (far * valid).sum() / valid.sum().clamp_min(1)

    def _fit(self, points: Tensor, valid: Tensor | None) -> None:
        """Fit the centroids to a batch: that of the first rank."""
        kept = points.detach()
        if valid is not None:
            every = valid.all(0)  # a place that is valid in each head
            kept = kept[:, every]
        if kept.shape[1] > POINTS:
            kept = kept[:, :: -(-kept.shape[1] // POINTS)]
        made = fitted(kept, self.shape[1], self.seed)
        if _ranks() > 1:
            torch.distributed.broadcast(made, 0)
        self.set(made)

    def settle(self) -> None:
        """Take the last batch into the moving average."""
        if self._pending is None:
            return
        sums, counts = self._pending
        self._pending = None
        with torch.no_grad():
            before = self.weight.to(sums) if self._exact is None else self._exact.to(sums)
            mean = sums / counts.clamp_min(1)[..., None]
            moved = functional.normalize(self.decay * before + (1 - self.decay) * mean, dim=-1)
            self._exact = torch.where(counts[..., None] > 0, moved, before)  # in half precision it would not move
            self.weight.copy_(self._exact)
            self.fits.add_(1)

    def train(self, mode: bool = True) -> Centroids:
        if not mode:
            self.settle()
            self.commitment = self._used = None
        return super().train(mode)

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.settle()
        super()._save_to_state_dict(*args, **kwargs)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._pending, self._exact, self._fitted = None, None, False
        super()._load_from_state_dict(*args, **kwargs)

    def used(self) -> Tensor:
        """Return the centroids ``[G, C, D]`` of this forward."""
        return self.weight if self._used is None else self._used

    def near(self, points: Tensor) -> Tensor:
        """Return the cosine of directions ``[R, H, P, D]`` with the centroids of their heads, ``[R, H, P, C]``.

        Heads of queries that share a key head share its centroids.
        """
        weight = self.used().to(points)
        each = points.unflatten(1, (weight.shape[0], -1))
        return torch.einsum("rgspd,gcd->rgspc", each, weight).flatten(1, 2)


def _ranks() -> int:
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if spread else 1
