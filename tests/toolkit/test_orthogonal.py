"""Orthogonal matrices: Hadamard matrices, random rotations, and Cayley steps."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.permutation.orthogonal import (
    cayley_step,
    hadamard_matrix,
    orthogonality_error,
    random_orthogonal,
    random_rotation,
)


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 20, 24, 28, 36, 40, 44, 60, 64, 76, 96, 108, 148, 320, 768])
def test_a_hadamard_matrix_has_entries_of_one_magnitude_and_orthogonal_rows(order):
    matrix = hadamard_matrix(order)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [0, 3, 6, 10, 92, 172])
def test_an_order_without_a_construction_has_none(order):
    assert hadamard_matrix(order) is None


@pytest.mark.parametrize("width", [8, 12, 32, 48, 80, 7, 22, 92])
@pytest.mark.parametrize("keeps_mean", [False, True])
def test_a_random_rotation_is_orthogonal_and_keeps_the_mean_if_it_must(width, keeps_mean):
    rotation = random_rotation(width, torch.Generator().manual_seed(0), keeps_mean)
    assert orthogonality_error(rotation) < 1e-12
    ones = torch.ones(width, dtype=torch.float64)
    kept = torch.allclose(rotation @ ones, ones, rtol=0, atol=1e-12)
    assert kept == keeps_mean
    if hadamard_matrix(width) is not None and not keeps_mean:
        torch.testing.assert_close(rotation.abs(), torch.full_like(rotation, width**-0.5))
    elif width > 8:
        # No channel stays by itself: an outlier is spread.
        assert float(rotation.abs().max()) < 0.9


def test_other_seeds_give_other_rotations():
    one, other = (random_rotation(16, torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert not torch.equal(one, other)


@pytest.mark.parametrize("keeps_mean", [False, True])
def test_cayley_steps_stay_orthogonal_and_go_downhill(keeps_mean):
    """The nearest rotation to a given one: ``|R - A|^2`` falls to the value at A, where it can."""
    generator = torch.Generator().manual_seed(3)
    start = torch.stack([random_rotation(12, generator, keeps_mean) for _ in range(2)])
    goal = torch.stack([random_rotation(12, generator, keeps_mean) for _ in range(2)])
    if not keeps_mean:  # rotations of determinant -1 cannot be reached from those of 1
        goal[:, 0] *= (torch.linalg.det(goal) * torch.linalg.det(start)).sign()[:, None]
    rotation, momentum = start, torch.zeros_like(start)
    distances = [float((rotation - goal).square().sum())]
    for _ in range(60):
        rotation = cayley_step(rotation, 2 * (rotation - goal), 0.1, momentum, keeps_mean)
        distances.append(float((rotation - goal).square().sum()))
    assert orthogonality_error(rotation) < 1e-10
    assert distances[-1] < 0.6 * distances[0]
    if keeps_mean:
        ones = torch.ones(12, dtype=torch.float64)
        assert torch.allclose(rotation @ ones, ones, rtol=0, atol=1e-10)


def test_a_step_is_the_cayley_transform_of_the_paper():
    generator = torch.Generator().manual_seed(4)
    rotation, gradient = random_orthogonal(6, generator), torch.randn(6, 6, generator=generator, dtype=torch.float64)
    found = cayley_step(rotation, gradient, 0.2, torch.zeros(6, 6, dtype=torch.float64), keeps_mean=False)
    # 2405.16406, equations 3 and 4: G_hat = G R^T - R G^T, normalized to the length of the step.
    skew = gradient @ rotation.T - rotation @ gradient.T
    skew = skew * 0.2 / torch.linalg.matrix_norm(skew, ord=2)
    eye = torch.eye(6, dtype=torch.float64)
    expected = torch.linalg.inv(eye + skew / 2) @ (eye - skew / 2) @ rotation
    torch.testing.assert_close(found, expected)
