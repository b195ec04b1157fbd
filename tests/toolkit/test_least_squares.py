"""Reconstruction under a mask, against the exact solution of every row."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.pruning.masks import nm_mask
from hf_optim.toolkit.quantization.least_squares import output_error, reconstruct_weights


@pytest.fixture
def problem():
    """Weights [out, in], correlated inputs [tokens, in], and their Gram matrix."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 24, generator=generator, dtype=torch.float64)
    mix = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    inputs = torch.randn(500, 24, generator=generator, dtype=torch.float64) @ (mix + 3 * torch.eye(24).double())
    return weight, inputs, inputs.T @ inputs


def exact(weight, mask, moment, damp):
    h = moment + damp * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
    solved = torch.zeros_like(weight)
    for row, kept in enumerate(mask):
        at = kept.nonzero()[:, 0]
        solved[row, at] = torch.linalg.solve(h[at][:, at], h[at] @ weight[row])
    return solved


@pytest.mark.parametrize("damp", [0.0, 0.01, 1.0])
def test_equals_the_exact_solution_of_every_row(problem, damp):
    weight, _, moment = problem
    mask = nm_mask(weight, 2, 4)
    found = reconstruct_weights(weight, mask, moment, damp=damp, tolerance=1e-12)
    torch.testing.assert_close(found, exact(weight, mask, moment, damp), rtol=1e-7, atol=1e-9)
    assert not found[~mask].any()


def test_outputs_are_closer_to_the_dense_ones(problem):
    weight, inputs, moment = problem
    mask = nm_mask(weight, 2, 4)
    dense = inputs @ weight.T
    plain = (inputs @ (weight * mask).T - dense).square().sum() / dense.square().sum()
    assert output_error(weight, weight * mask, moment) == pytest.approx(float(plain))
    assert output_error(weight, reconstruct_weights(weight, mask, moment), moment) < 0.8 * float(plain)


def test_a_full_mask_changes_nothing(problem):
    weight, _, moment = problem
    assert torch.equal(reconstruct_weights(weight, torch.ones_like(weight, dtype=torch.bool), moment), weight)
    assert output_error(weight, weight, moment) == 0.0


def test_weights_of_dead_inputs_do_not_change(problem):
    weight, _, moment = problem
    mask = nm_mask(weight, 2, 4)
    assert torch.equal(reconstruct_weights(weight, mask, torch.zeros_like(moment)), weight * mask)
    assert output_error(weight, weight * mask, torch.zeros_like(moment)) == 0.0
    moment = moment.clone()
    moment[3], moment[:, 3] = 0.0, 0.0
    found = reconstruct_weights(weight, mask, moment)
    assert bool(found.isfinite().all())
    torch.testing.assert_close(found[:, 3], (weight * mask)[:, 3])
