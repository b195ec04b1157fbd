"""Sparse variational dropout: the KL divergence against the integral it approximates, and the noise of outputs."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn

from hf_optim.toolkit.pruning.sparse_variational import (
    FLOOR,
    K1,
    K2,
    K3,
    WeightNoise,
    kl_divergence,
    log_alpha,
    output_noise,
)

NODES, WEIGHTS = np.polynomial.legendre.leggauss(200)
TAIL = 14.0


def expected_log(alpha: float) -> float:
    """``E log|1 + sqrt(α) ε|``, ``ε ~ N(0, 1)``, by quadrature on both sides of the singularity, in float64."""
    zero, total = -1.0 / math.sqrt(alpha), 0.0
    # From the singularity to both tails; where it lies beyond a tail, from there to the other.
    start, power = (zero, 4) if zero > -TAIL else (-TAIL, 1)
    for end in (-TAIL, TAIL):
        # t = start + (end - start) v⁴ removes the singularity of the logarithm.
        v = (NODES + 1) / 2
        past = (end - start) * v**power
        t = start + past
        density = np.exp(-(t**2) / 2) / math.sqrt(2 * math.pi)
        value = (
            density
            * np.log(math.sqrt(alpha) * np.abs(start - zero + past))
            * power
            * v ** (power - 1)
            * abs(end - start)
            / 2
        )
        total += float((value * WEIGHTS).sum())
    return total


def exact_kl(log_alpha: float) -> float:
    """The divergence of N(w, α w²) from the log-uniform prior, with the constant that makes it vanish for α → ∞."""
    constant = -(np.euler_gamma + math.log(2)) / 2  # E log|ε|
    return expected_log(math.exp(log_alpha)) - 0.5 * log_alpha - constant


def test_the_quadrature_equals_known_closed_forms():
    # For large α it is ½ log α + E log|ε|, for small α 0 to first order: log|1 + x| ~ x - x²/2.
    assert expected_log(1e12) == pytest.approx(0.5 * math.log(1e12) - (np.euler_gamma + math.log(2)) / 2, abs=1e-5)
    assert expected_log(1e-4) == pytest.approx(-0.5e-4 - 0.75e-8, abs=1e-10)
    draws = torch.randn(4_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert expected_log(2.0) == pytest.approx((1 + math.sqrt(2.0) * draws).abs().log().mean().item(), abs=2e-3)


def test_the_approximation_agrees_with_the_integral():
    grid = torch.linspace(-9.0, 9.0, 73, dtype=torch.float64)
    exact = torch.tensor([exact_kl(float(value)) for value in grid], dtype=torch.float64)
    error = (kl_divergence(grid) - exact).abs()
    assert error.max() < 0.01, float(error.max())
    # It is the formula of the paper, not merely close to it.
    paper = -(K1 * torch.sigmoid(K2 + K3 * grid) - 0.5 * torch.log(1 + torch.exp(-grid)) - K1)
    torch.testing.assert_close(kl_divergence(grid), paper, rtol=0, atol=1e-12)


def test_it_decreases_with_alpha_and_is_finite_at_both_ends():
    grid = torch.linspace(-60.0, 60.0, 121)
    values = kl_divergence(grid)
    assert (values.diff() <= 0).all()
    assert values[0] == pytest.approx(30.0 + K1, abs=1e-3)
    assert 0 <= values[-1] < 1e-20
    grid.requires_grad_(True)
    kl_divergence(grid).sum().backward()
    assert torch.isfinite(grid.grad).all()


def test_log_alpha_is_the_ratio_with_a_lower_bound():
    weight = torch.tensor([0.5, -0.5, 0.0], requires_grad=True)
    found = log_alpha(weight, torch.full((3,), -2.0))
    assert found.tolist() == pytest.approx([-2.0 - math.log(0.25)] * 2 + [-2.0 - math.log(FLOOR)])
    found.sum().backward()
    assert torch.equal(weight.grad, torch.tensor([-4.0, 4.0, 0.0]))
    assert log_alpha(weight.detach().bfloat16(), torch.zeros(3)).dtype == torch.float32


def test_sampling_outputs_equals_sampling_weights():
    """Mean and variance over samples, against those of layers whose weights are sampled."""
    generator = torch.Generator().manual_seed(3)
    input = torch.randn(3, 5, generator=generator)
    variance = torch.rand(4, 5, generator=generator)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        draws = torch.stack([output_noise(input, variance) for _ in range(20_000)])
        weights = torch.randn(20_000, 4, 5) * variance.sqrt()
    by_weights = torch.einsum("bi,noi->nbo", input, weights)
    torch.testing.assert_close(draws.mean(0), torch.zeros(3, 4), rtol=0, atol=0.06)
    torch.testing.assert_close(draws.var(0), by_weights.var(0), rtol=0.06, atol=0)
    # Unlike noise of weights, that of outputs is independent for each row.
    assert abs(torch.corrcoef(draws[:, :2, 0].T)[0, 1]) < 0.03


def test_half_precision_does_not_overflow_and_zeros_have_a_gradient():
    input = torch.full((1, 4), 300.0, dtype=torch.float16)  # its square is beyond float16
    assert torch.isfinite(output_noise(input, torch.ones(2, 4))).all()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert output_noise(torch.ones(2, 4), torch.ones(2, 4)).dtype == torch.bfloat16
    variance = torch.zeros(2, 4, requires_grad=True)
    noise = output_noise(torch.zeros(1, 4), variance)
    noise.sum().backward()
    assert noise.abs().max() < 1e-15
    assert torch.isfinite(variance.grad).all()


@pytest.mark.parametrize(
    ("build", "name"), [(tiny_llama, "model.layers.0.mlp.up_proj"), (tiny_gpt2, "transformer.h.0.mlp.c_fc")]
)
def test_without_variance_a_layer_is_dense_and_masked_weights_have_no_noise(build, name):
    model = build()
    layer = model.get_submodule(name)
    input = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(1))
    dense = layer(input)
    kept: dict[str, torch.Tensor] = {}
    noise = WeightNoise(layer, f"{name}.weight", kept, dict, initial=-math.inf)
    layer.train()
    torch.testing.assert_close(layer(input), dense, rtol=0, atol=1e-6)  # α → 0
    with torch.no_grad():
        layer.log_variance.fill_(-2.0)
        layer.weight.zero_()
    assert (layer(input) - dense).abs().max() > 0.1
    total = noise.divergence()
    # All weights of some outputs are masked: these have no noise, and only the others count.
    out = layer.bias.shape[0] if layer.bias is not None else layer.weight.shape[0]
    gone = torch.arange(out) % 2 == 0
    mask = (~gone).unsqueeze(1).expand(out, 32)
    kept[f"{name}.weight"] = (mask if isinstance(layer, nn.Linear) else mask.T).contiguous()
    bias = 0.0 if layer.bias is None else layer.bias
    output = layer(input) - bias
    assert output[..., gone].abs().max() < 1e-12
    assert output[..., ~gone].abs().min() > 0
    assert noise.divergence().item() == pytest.approx(total.item() / 2, rel=1e-5)
