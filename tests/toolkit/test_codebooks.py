"""Codebook fitting against brute force on the unsorted values."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from hf_optim.toolkit.quantization.codebooks import fit_codebook, nearest_centroids, outlier_mask


def heavy_tailed(n, seed):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=generator) * 0.05
    values[: n // 50] *= 6
    return values[torch.randperm(n, generator=generator)]


def skewed(n, seed):
    """Values whose bins of equal population are far from optimal."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) ** 3 - 0.2


def plain(values, levels, iterations):
    """The iterations of GOBO as the paper states them, value by value: centroids and sums of distances."""
    wide = values.double()
    order = wide.sort().values
    edges = [i * len(wide) // levels for i in range(levels + 1)]
    centroids = torch.stack([order[a:b].mean() for a, b in itertools.pairwise(edges)])
    found, sums = [], []
    for _ in range(iterations + 1):
        distance = (wide[:, None] - centroids).abs()
        code = distance.argmin(1)
        total = float(distance.min(1).values.sum())
        if sums and total >= sums[-1]:
            break
        found.append(centroids)
        sums.append(total)
        means = [wide[code == i].mean() if (code == i).any() else centroids[i] for i in range(levels)]
        centroids = torch.stack(means)
    return found[-1], sums


@pytest.mark.parametrize(("n", "levels"), [(4000, 8), (1001, 4), (513, 16), (37, 3)])
@pytest.mark.parametrize("make", [heavy_tailed, skewed])
def test_the_centroids_equal_the_plain_iterations(n, levels, make):
    values = make(n, levels)
    wanted, sums = plain(values, levels, 100)
    book = fit_codebook(values, levels)
    assert torch.allclose(book.centroids, wanted, atol=1e-12, rtol=0)
    assert book.history == pytest.approx(sums, rel=1e-10)


@pytest.mark.parametrize("levels", [4, 8, 32])
def test_the_sum_of_distances_falls_and_is_that_of_the_centroids_returned(levels):
    values = skewed(20000, 7)
    book = fit_codebook(values, levels)
    assert len(book.history) > 1
    assert all(b < a for a, b in itertools.pairwise(book.history))
    codes = nearest_centroids(values, book.centroids)
    total = (values.double() - book.centroids[codes.long()]).abs().sum()
    assert float(total) == pytest.approx(book.history[-1], rel=1e-10)


def test_iterations_can_be_bounded():
    values = skewed(5000, 1)
    assert len(fit_codebook(values, 8, iterations=0).history) == 1
    assert len(fit_codebook(values, 8, iterations=2).history) == 3
    first = fit_codebook(values, 8, iterations=0).centroids
    bins = values.double().sort().values.view(8, -1).mean(1)
    assert torch.allclose(first, bins, atol=1e-15, rtol=0)


def test_codes_are_those_of_the_nearest_centroid():
    values = heavy_tailed(3000, 3).view(50, 60)
    centroids = torch.randn(16, generator=torch.Generator().manual_seed(0)).sort().values * 0.1
    codes = nearest_centroids(values, centroids)
    assert codes.dtype == torch.uint8
    assert codes.shape == values.shape
    distance = (values.double()[..., None] - centroids.double()).abs()
    assert torch.equal(distance.gather(-1, codes.long()[..., None])[..., 0], distance.amin(-1))


@pytest.mark.parametrize("levels", [3, 4, 8])
def test_a_pinned_centroid_does_not_move(levels):
    values = heavy_tailed(4000, 5) + 0.01
    book = fit_codebook(values, levels, pinned=0.0)
    assert len(book.centroids) == levels
    assert (book.centroids == 0).sum() == 1
    assert bool((book.centroids.diff() > 0).all())
    assert all(b < a for a, b in itertools.pairwise(book.history))
    code = nearest_centroids(values, book.centroids)
    for i in range(levels):
        if book.centroids[i] != 0:
            # The best set is not necessarily a fixed point, but its centroids lie among their weights.
            own = values[code == i]
            assert own.min() <= book.centroids[i] <= own.max()


@pytest.mark.parametrize("values", [torch.tensor([0.5]), torch.zeros(9), torch.tensor([1.0, -1.0, 1.0])])
def test_fewer_values_than_centroids_are_exact(values):
    book = fit_codebook(values, 8)
    assert torch.isfinite(book.centroids).all()
    assert torch.equal(book.centroids[nearest_centroids(values, book.centroids).long()].float(), values)
    assert book.history[-1] == 0


def test_outliers_have_a_low_log_density():
    weight = heavy_tailed(6000, 2).view(60, 100)
    wide = weight.double()
    normal = torch.distributions.Normal(wide.mean(), wide.std(correction=0))
    for threshold in (-4.0, -8.0, 0.0):
        wanted = normal.log_prob(wide) < threshold
        assert torch.equal(outlier_mask(weight, threshold), wanted)
    assert 0 < outlier_mask(weight, -4.0).float().mean() < 0.05


def test_pruned_weights_are_ignored():
    weight = heavy_tailed(6000, 4)
    kept = torch.rand(6000, generator=torch.Generator().manual_seed(1)) < 0.5
    pruned = weight * kept
    found = outlier_mask(pruned, -4.0, kept)
    assert torch.equal(found[kept], outlier_mask(weight[kept], -4.0))
    assert not found[~kept].any()


def test_constant_weights_have_no_outliers_and_wide_ones_are_all_outliers():
    assert not outlier_mask(torch.full((5, 5), 3.0), -4.0).any()
    wide = torch.linspace(-200, 200, 500)
    assert math.log(float(wide.std())) > 4
    assert outlier_mask(wide, -4.0).all()
