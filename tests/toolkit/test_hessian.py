"""The Cholesky factor of the inverse Hessian: exact, damped, and refused with a name."""

from __future__ import annotations

import pytest
import torch

from hf_optim.errors import NumericalError
from hf_optim.toolkit.quantization import hessian as hessian_module
from hf_optim.toolkit.quantization.hessian import damp_, inverse_cholesky, invert_lower_, reverse_


def gram(width: int = 12, tokens: int = 40, seed: int = 0) -> torch.Tensor:
    x = torch.randn(tokens, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.T @ x / tokens


def test_the_factor_is_upper_triangular_and_gives_the_inverse():
    hessian = gram()
    found = inverse_cholesky(hessian, damp=0.01)
    expected = torch.linalg.inv(hessian + 0.01 * hessian.diagonal().mean() * torch.eye(12, dtype=torch.float64))
    assert found.damp == 0.01
    assert torch.equal(found.upper, found.upper.triu())
    torch.testing.assert_close(found.upper.T @ found.upper, expected)


def test_the_argument_is_not_changed():
    hessian = gram()
    before = hessian.clone()
    inverse_cholesky(hessian)
    assert torch.equal(hessian, before)


def test_dead_inputs_are_decoupled_and_do_not_count_in_the_mean():
    hessian = gram()
    hessian[4, :] = 0
    hessian[:, 4] = 0
    mean = hessian.diagonal()[hessian.diagonal() > 0].mean()
    out = damp_(hessian.clone(), 0.1)
    torch.testing.assert_close(out[4, 4], 1.1 * mean)
    assert out[4].count_nonzero() == 1
    alive = [i for i in range(12) if i != 4]
    torch.testing.assert_close(out[0, 0], hessian[0, 0] + 0.1 * mean)
    assert torch.equal(out[alive][:, alive].triu(1), hessian[alive][:, alive].triu(1))


def test_all_inputs_dead():
    upper = inverse_cholesky(torch.zeros(3, 3), damp=0.01).upper
    torch.testing.assert_close(upper, torch.eye(3) / 1.01**0.5)


def test_damping_is_raised_until_the_matrix_is_positive_definite():
    hessian = gram()
    lowest = torch.linalg.eigvalsh(hessian)[0] + 0.02 * hessian.diagonal().mean()
    shifted = hessian - lowest * torch.eye(12, dtype=torch.float64)
    assert torch.linalg.eigvalsh(shifted)[0] < 0
    found = inverse_cholesky(shifted, damp=1e-4)
    assert found.damp == pytest.approx(0.1)
    expected = torch.linalg.inv(damp_(shifted.clone(), found.damp))
    torch.testing.assert_close(found.upper.T @ found.upper, expected)


def test_a_rank_one_hessian_passes_with_the_usual_damping():
    x = torch.ones(1, 64)
    found = inverse_cholesky(x.T @ x, damp=0.01)
    assert found.damp == 0.01


def test_a_singular_matrix_is_refused_by_name():
    with pytest.raises(NumericalError, match=r"step 1 \(gptq\): q_proj is singular.*float64"):
        inverse_cholesky(gram() - 100 * torch.eye(12, dtype=torch.float64), label="step 1 (gptq): q_proj")


def test_a_non_finite_matrix_is_refused_by_name():
    hessian = gram()
    hessian[2, 3] = float("inf")
    with pytest.raises(NumericalError, match="q_proj is not finite"):
        inverse_cholesky(hessian, label="q_proj")


@pytest.mark.parametrize("width", [1, 2, 7, 60])
def test_the_factor_of_reordered_columns(monkeypatch, width):
    """By strips and halves smaller than the matrix, against a direct factorization of the inverse."""
    monkeypatch.setattr(hessian_module, "STRIP", 8)
    monkeypatch.setattr(hessian_module, "LEAF", 5)
    hessian = gram(width, 3 * width)
    order = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    found = inverse_cholesky(hessian, order=order).upper
    inverse = torch.linalg.inv(damp_(hessian.clone(), 0.01))[order][:, order]
    torch.testing.assert_close(found, torch.linalg.cholesky(inverse, upper=True))
    assert found.is_contiguous()


@pytest.mark.parametrize("n", [1, 5, 6, 33])
def test_triangles_are_inverted_and_matrices_reversed_in_place(monkeypatch, n):
    monkeypatch.setattr(hessian_module, "STRIP", 4)
    monkeypatch.setattr(hessian_module, "LEAF", 3)
    lower = gram(n, 2 * n).tril() + 3 * torch.eye(n, dtype=torch.float64)
    expected = torch.linalg.inv(lower)
    assert invert_lower_(lower) is lower
    torch.testing.assert_close(lower, expected)
    flipped = lower.flip(0, 1)
    assert reverse_(lower) is lower
    assert torch.equal(lower, flipped)


def test_what_float32_cannot_factor_is_factored_in_float64_before_damping_is_raised():
    basis = torch.linalg.qr(gram(60, 200)).Q
    hessian = (basis * torch.logspace(0, -9, 60, dtype=torch.float64)) @ basis.T
    hessian = ((hessian + hessian.T) / 2).float()
    lowest = float(torch.linalg.eigvalsh(hessian.double())[0] / hessian.diagonal().mean())
    damp = 1e-8 - min(lowest, 0.0)  # positive definite, by less than float32 resolves
    assert hessian_module._factor(damp_(hessian.clone(), damp)) is None
    found = inverse_cholesky(hessian, damp)
    assert found.damp == damp
    assert found.upper.dtype == torch.float32
    exact = inverse_cholesky(hessian.double(), damp)
    assert exact.damp == damp
    torch.testing.assert_close(found.upper, exact.upper.float())
