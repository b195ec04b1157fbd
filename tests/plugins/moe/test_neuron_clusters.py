"""Clusters of equal size, and the router that is trained to find them."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from hf_optim import NumericalError
from hf_optim_plugins.moe._neuron_clusters import (
    activation_features,
    balanced_assignment,
    balanced_kmeans,
    weight_features,
)
from hf_optim_plugins.moe._neuron_router import covered_share, neuron_mass, train_router


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def total(cost, labels):
    return float(cost.double().gather(1, labels[:, None]).sum())


def least(cost, size):
    """The cost of the best assignment, by trying all."""
    slots = [cluster for cluster in range(cost.shape[1]) for _ in range(size)]
    return min(total(cost, torch.tensor(p)) for p in set(itertools.permutations(slots)))


@pytest.mark.parametrize("seed", range(4))
def test_two_clusters_are_assigned_at_the_least_cost(seed):
    cost = drawn(8, 2, seed=seed)
    labels = balanced_assignment(cost)
    assert labels.bincount().tolist() == [4, 4]
    assert total(cost, labels) == pytest.approx(least(cost, 4), abs=1e-6)


def test_three_clusters_are_assigned_near_the_least_cost():
    gaps = []
    for seed in range(6):
        cost = drawn(6, 3, seed=seed)
        labels = balanced_assignment(cost)
        assert labels.bincount().tolist() == [2, 2, 2]
        best = least(cost, 2)
        gaps.append((total(cost, labels) - best) / abs(best))
    assert sum(gap < 1e-6 for gap in gaps) >= 4
    assert max(gaps) < 0.1


def test_no_swap_of_two_rows_costs_less():
    cost = drawn(60, 5).double()
    labels = balanced_assignment(cost)
    own = cost.gather(1, labels[:, None])
    gain = own - cost[:, labels]  # [i, j]: of i, moved to where j is
    assert float((gain + gain.T).max()) < 1e-8


@pytest.mark.parametrize("kind", ["weights", "coactivation"])
def test_planted_groups_are_found(kind):
    truth = torch.arange(4).repeat_interleave(8)[torch.randperm(32, generator=torch.Generator().manual_seed(3))]
    if kind == "weights":
        points = weight_features(drawn(4, 16)[truth] + 0.1 * drawn(32, 16, seed=1))
    else:
        active = torch.rand(600, 4, generator=torch.Generator().manual_seed(4)) < 0.3
        points = activation_features(active[:, truth] * (1 + 0.1 * drawn(600, 32, seed=2)).abs(), seed=0)
        assert points.shape == (32, 256)
    found = min((balanced_kmeans(points, 4, seed) for seed in range(4)), key=lambda x: spread(points, x))
    groups = {tuple((found == c).nonzero().flatten().tolist()) for c in range(4)}
    assert groups == {tuple((truth == c).nonzero().flatten().tolist()) for c in range(4)}


def spread(points, labels):
    return sum(float((points[labels == c] - points[labels == c].mean(0)).square().sum()) for c in labels.unique())


def test_the_mass_of_a_gated_layer_is_its_magnitude():
    x, gate, up = drawn(3, 5), drawn(4, 5, seed=1), drawn(4, 5, seed=2)
    found = neuron_mass(x, ((gate, None), (up, None)), F.silu)
    torch.testing.assert_close(found, (F.silu(x @ gate.T) * (x @ up.T)).abs())


def test_the_router_learns_what_weights_do_not_show():
    x = drawn(800, 16)
    # The third expert is active where the first input is small: its center, the mean weight, points the other way.
    mass = torch.stack([x[:, 0].relu(), x[:, 1].relu(), (0.5 - x[:, 0]).relu() * 3], 1)
    centers = F.normalize(torch.eye(3, 16), dim=-1)
    first, second = train_router(x, mass, centers, 1, 10, 0, "step 1")
    score = torch.tanh(F.normalize(x, dim=-1) @ first.T) @ second.T
    start = torch.tanh(F.normalize(x, dim=-1) @ centers.T)
    reached = covered_share(mass, score.topk(1).indices)
    assert reached > covered_share(mass, start.topk(1).indices) + 0.05
    assert reached <= covered_share(mass, mass.topk(1).indices)
    again = train_router(x, mass, centers, 1, 10, 0, "step 1")
    assert torch.equal(first, again[0])
    assert torch.equal(second, again[1])


def test_a_router_without_epochs_is_the_centers():
    first, second = train_router(drawn(9, 4), drawn(9, 2).abs(), torch.eye(2, 4), 1, 0, 0, "step 1")
    assert torch.equal(first, torch.eye(2, 4))
    assert torch.equal(second, torch.eye(2))


def test_a_router_whose_loss_is_not_finite_is_refused():
    mass = torch.full((9, 2), torch.inf)
    with pytest.raises(NumericalError, match="step 1: the loss of a router became nan"):
        train_router(drawn(9, 4), mass, torch.eye(2, 4), 1, 1, 0, "step 1")


def test_no_mass_is_wholly_covered():
    assert covered_share(torch.zeros(3, 4), torch.zeros(3, 1, dtype=torch.long)) == 1.0
