"""Divide neurons into clusters of exactly equal size: balanced k-means."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = 1e-9
"""Gains of a swap below it are rounding."""
FEATURES = 256
"""To how many dimensions patterns of activation are projected."""


def balanced_kmeans(points: Tensor, clusters: int, seed: int, iterations: int = 20) -> Tensor:
    """Return the cluster of each point, int64 ``[N]``; every cluster has ``N / clusters`` of them.

    Lloyd's iterations with a balanced assignment; the division with the least sum of squared distances is returned.

    Args:
        points: ``[N, features]``.
        clusters: a divisor of N.
        seed: of the first centers, which are random points.
        iterations: at most.
    """
    points = points.float()
    generator = torch.Generator().manual_seed(seed)
    centers = points[torch.randperm(len(points), generator=generator)[:clusters].to(points.device)]
    best: tuple[float, Tensor] | None = None
    for _ in range(iterations):
        labels = balanced_assignment(torch.cdist(points, centers).square())
        centers = means(points, labels, clusters)
        spread = float((points - centers[labels]).square().sum())
        if best is not None and spread >= best[0] * (1 - 1e-6):
            break
        best = spread, labels
    assert best is not None
    return best[1]


def means(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the mean of the points of each cluster, ``[clusters, features]``."""
    members = labels.argsort(stable=True).view(clusters, -1)
    return points[members].mean(1)


def balanced_assignment(cost: Tensor) -> Tensor:
    """Return a cluster for each row, int64 ``[N]``, equally often each, such that no swap of two rows costs less.

    For two clusters this is the assignment of least cost; for more it is a local minimum of swaps.

    Args:
        cost: ``[N, clusters]``, clusters a divisor of N.
    """
    count, clusters = cost.shape
    size = count // clusters
    cost = cost.double()
    labels = _first_come(cost, size)
    everyone = torch.arange(clusters, device=cost.device)
    for _ in range(20 * clusters):
        members = labels.argsort(stable=True).view(clusters, size)
        own = cost[members, everyone[:, None]].unsqueeze(-1)  # [clusters, size, 1]
        gain, who = (own - cost[members]).max(1)  # gain[a, b]: of the member of a that most wants to move to b
        both = gain + gain.T
        swapped = False
        free = torch.ones(clusters, dtype=torch.bool)
        wanted = both.triu(1)
        for flat in wanted.flatten().topk(min(clusters * 2, clusters * clusters)).indices.tolist():
            a, b = divmod(flat, clusters)
            if float(wanted[a, b]) <= TOLERANCE:
                break
            if free[a] and free[b]:
                labels[members[a, who[a, b]]], labels[members[b, who[b, a]]] = b, a
                free[a] = free[b] = False
                swapped = True
        if not swapped:
            break
    return labels


def _first_come(cost: Tensor, size: int) -> Tensor:
    """Assign rows to the nearest cluster with room, round by round; the nearest rows of a cluster come first."""
    count, clusters = cost.shape
    labels = torch.full((count,), -1, dtype=torch.long, device=cost.device)
    room = [size] * clusters
    while bool((left := (labels < 0).nonzero().flatten()).numel()):
        closed = torch.tensor([places == 0 for places in room], device=cost.device)
        nearest = cost[left].masked_fill(closed, torch.inf)
        price, wish = nearest.min(1)
        for cluster in wish.unique().tolist():
            asking = (wish == cluster).nonzero().flatten()
            taken = asking[price[asking].argsort(stable=True)[: room[cluster]]]
            labels[left[taken]] = cluster
            room[cluster] -= len(taken)
    return labels


def weight_features(rows: Tensor) -> Tensor:
    """Return the rows ``[neurons, in]`` of the first matrix with length one, as the paper clusters them."""
    return F.normalize(rows.float(), dim=-1)


def activation_features(mass: Tensor, seed: int) -> Tensor:
    """Return the pattern of activation of each neuron with length one, ``[neurons, FEATURES]`` at most.

    The sum of the squared distances within equal clusters of these points falls as the sum of the neurons' pairwise
    co-activation (the cosine of their patterns) rises: k-means divides the co-activation graph. The patterns over the
    tokens are projected by a random matrix, which keeps cosines up to about ``1 / sqrt(FEATURES)``.

    Args:
        mass: ``[tokens, neurons]``, magnitudes of activations.
        seed: of the projection.
    """
    patterns = F.normalize(mass.float().T, dim=-1)
    if patterns.shape[1] > FEATURES:
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(patterns.shape[1], FEATURES, generator=generator).to(patterns) / FEATURES**0.5
        patterns = F.normalize(patterns @ drawn, dim=-1)
    return patterns
