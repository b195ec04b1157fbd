"""Hard concrete gates: closed forms against sampling, and the gate at test time."""

from __future__ import annotations

import math

import pytest
import torch

from hf_optim.toolkit.pruning.hard_concrete import (
    CLOSED_LOG_ALPHA,
    GAMMA,
    TEMPERATURE,
    ZETA,
    deterministic_gates,
    gates_from_uniform,
    initial_log_alpha,
    open_probability,
    sample_gates,
)


@pytest.mark.parametrize("temperature", [TEMPERATURE, 0.3])
def test_the_probability_of_an_open_gate_is_the_share_of_open_samples(temperature):
    log_alpha = torch.tensor([-4.0, -2.0, -0.5, 0.0, 1.0, 3.0], dtype=torch.float64)
    count = 200_000
    uniform = torch.rand(count, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gates = gates_from_uniform(log_alpha, uniform, temperature)
    assert gates.min() == 0.0
    assert gates.max() == 1.0
    expected = open_probability(log_alpha, temperature)
    error = (4 * (expected * (1 - expected) / count).sqrt()).tolist()
    for found, right, allowed in zip((gates != 0).double().mean(0).tolist(), expected.tolist(), error, strict=True):
        assert found == pytest.approx(right, abs=allowed)


def test_the_closed_form_equals_the_distribution_of_the_stretched_variable():
    """P(z ≠ 0) = P(s̄ > 0): the draw at which the gate leaves zero, found by bisection, in float64."""
    log_alpha = torch.tensor(0.7, dtype=torch.float64)
    low, high = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if gates_from_uniform(log_alpha, middle) == 0 else (low, middle)
    assert 1 - low.item() == pytest.approx(open_probability(log_alpha).item(), abs=1e-12)


def test_the_gate_at_test_time_is_the_formula_with_exact_zeros():
    log_alpha = torch.linspace(-8.0, 8.0, 161, dtype=torch.float64)
    formula = [min(1.0, max(0.0, (ZETA - GAMMA) / (1 + math.exp(-a)) + GAMMA)) for a in log_alpha.tolist()]
    gates = deterministic_gates(log_alpha)
    torch.testing.assert_close(gates, torch.tensor(formula, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(gates == 0, log_alpha <= CLOSED_LOG_ALPHA)
    assert deterministic_gates(torch.tensor(CLOSED_LOG_ALPHA)) == 0
    assert pytest.approx(math.log(0.1 / 1.1)) == CLOSED_LOG_ALPHA


def test_the_gradient_passes_only_where_a_gate_is_between_zero_and_one():
    log_alpha = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    uniform = torch.tensor([0.001, 0.5, 0.999], dtype=torch.float64)
    gates = gates_from_uniform(log_alpha, uniform)
    assert gates[0] == 0
    assert gates[2] == 1
    gates.sum().backward()
    # dz/d log α = s (1 - s) (ζ - γ) / β at s = 1/2.
    assert log_alpha.grad.tolist() == pytest.approx([0.0, 0.25 * (ZETA - GAMMA) / TEMPERATURE, 0.0])


def test_samples_are_finite_and_start_at_the_given_probability():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert torch.isfinite(sample_gates(torch.zeros(100_000))).all()
    assert torch.sigmoid(torch.tensor(initial_log_alpha(0.9))).item() == pytest.approx(0.9)
