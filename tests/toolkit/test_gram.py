"""Gram matrices: complete on a CPU, by panels and mirrored elsewhere; both against float64."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.statistics import gram


@pytest.fixture
def narrow(monkeypatch):
    """Panels of 16 columns, 32 rows at a time."""
    monkeypatch.setattr(gram, "PANEL", 16)
    monkeypatch.setattr(gram, "ROWS", 32)


def inputs(tokens, width, dtype=torch.float32):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_on_a_cpu_the_whole_matrix_is_summed(dtype):
    rows = inputs(50, 20, dtype)
    total = torch.ones(20, 20, dtype=torch.float64)
    gram.accumulate_(total, rows)
    gram.mirror_(total)
    torch.testing.assert_close(total, 1 + rows.double().T @ rows.double())


@pytest.mark.parametrize("width", [1, 16, 40, 48])
def test_panels_and_their_mirror_image(narrow, width):
    rows = inputs(70, width, torch.float64)
    total = torch.zeros(width, width, dtype=torch.float64)
    for part in rows.split(30):
        gram.accumulate_panels_(total, part)
    if width > 16:
        assert not total[16:, :16].any()
    gram.mirror_panels_(total)
    torch.testing.assert_close(total, rows.T @ rows)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("width", [48, 4500])
def test_on_cuda_products_of_16_bits_are_exact(dtype, width):
    rows = inputs(3000, width, dtype).cuda()
    total = torch.zeros(width, width, device="cuda")
    for part in rows.split(1100):
        gram.accumulate_(total, part)
    gram.mirror_(total)
    exact = rows.double().T @ rows.double()
    # The products are exact; the tensor cores cut off, where the float32 product rounds, when they add to a sum.
    bound = 1e-5 if dtype in (torch.bfloat16, torch.float16) else 1e-6
    assert float((total.double() - exact).norm() / exact.norm()) < bound
