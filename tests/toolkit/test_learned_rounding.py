"""Learned rounding: it starts at rounding to nearest, its gradients are the formula's, what is trained is stored."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.quantization import GridSpec, LearnedRounding, ProjectedAdam, SignedDescent, make_grid

SPECS = [
    GridSpec(2, strategy="group", group_size=8, symmetric=False),
    GridSpec(3, strategy="group", group_size=8),
    GridSpec(4, strategy="channel", symmetric=False),
    GridSpec(8, strategy="channel"),
]


def matrix(dtype=torch.float32):
    return torch.randn(6, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype) * 0.3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("observer", ["minmax", "mse"])
@pytest.mark.parametrize(("spec", "signed"), [*((spec, False) for spec in SPECS), (SPECS[1], True), (SPECS[3], True)])
def test_it_starts_at_rounding_to_nearest(spec, signed, observer, dtype):
    weight = matrix(dtype)
    rounding = LearnedRounding(weight, spec, observer, signed=signed)
    codes, grid = rounding.quantize()
    expected = make_grid(weight, spec, observer, signed=signed)
    torch.testing.assert_close(grid.scale, expected.scale, rtol=2e-3 if dtype.itemsize == 2 else 1e-6, atol=0)
    differ = (codes != expected.quantize(weight)).float().mean()
    assert differ <= (0.02 if dtype.itemsize == 2 or observer == "mse" else 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("spec", "signed"), [*((spec, False) for spec in SPECS), (SPECS[1], True)])
def test_what_the_forward_computes_is_what_is_stored(spec, signed, dtype):
    rounding = LearnedRounding(matrix(dtype), spec, signed=signed)
    with torch.no_grad():
        rounding.offset.uniform_(-0.5, 0.5)
        for share in rounding.shares:
            share.uniform_(0.4, 1.0)
    codes, grid = rounding.quantize()
    assert torch.equal(grid.dequantize(codes).to(dtype), rounding.fake_weight().detach())
    assert torch.equal(grid.scale, grid.scale.to(dtype).to(grid.scale.dtype))
    assert int(codes.min()) >= grid.spec.low
    assert int(codes.max()) <= grid.spec.high


@pytest.mark.parametrize("signed", [False, True])
def test_gradients_are_those_of_the_formula(signed):
    spec = GridSpec(3, strategy="group", group_size=8)
    weight = matrix(torch.float64)
    rounding = LearnedRounding(weight, spec, signed=signed)
    with torch.no_grad():
        rounding.offset.uniform_(-0.5, 0.5)
        rounding.shares[0].fill_(0.6)
    upstream = torch.randn(6, 32, dtype=torch.float64)
    offset, share = torch.autograd.grad((rounding.fake_weight() * upstream).sum(), rounding.parameters())
    parts, v, g = (t.detach().view(6, 4, 8) for t in (weight, rounding.offset, upstream))
    full = parts.abs().amax(-1, keepdim=True) * 2 / 7
    if signed:  # the value that is largest in magnitude on the code -4
        full = parts.gather(-1, parts.abs().argmax(-1, keepdim=True)) / -4
        assert bool((full < 0).any())
        assert bool((full > 0).any())
    scale = full * 0.6
    raw = (parts / scale + v).round()
    inside = (raw >= -4) & (raw <= 3)
    torch.testing.assert_close(offset, (g * scale * inside).reshape(6, 32))
    # d/da of s q(w / s + V): q where it is clamped, and q - w / s inside, by the gradient of the identity.
    slope = torch.where(inside, raw - parts / scale, raw.clamp(-4, 3))
    torch.testing.assert_close(share, (g * slope * full).sum(-1))


def test_shares_of_both_ends_have_gradients_and_bounds():
    rounding = LearnedRounding(matrix(), GridSpec(2, strategy="group", group_size=8, symmetric=False))
    found = torch.autograd.grad(rounding.fake_weight().square().sum(), rounding.parameters())
    assert all(bool(gradient.isfinite().all()) and bool(gradient.any()) for gradient in found)
    with torch.no_grad():
        rounding.offset.fill_(3.0)
        rounding.shares[0].fill_(-1.0)
        rounding.shares[1].fill_(4.0)
    rounding.project()
    assert float(rounding.offset.detach().max()) == 0.5
    assert float(rounding.shares[0].detach().min()) > 0
    assert float(rounding.shares[1].detach().max()) == 1.0


def test_offsets_move_as_far_as_they_may():
    for largest, found in ((0.5, 0.5), (2.0, 2.0), (None, 3.0)):
        rounding = LearnedRounding(matrix(), SPECS[1], largest_offset=largest)
        rounding.offset.data.fill_(3.0)
        rounding.project()
        assert float(rounding.offset.detach().max()) == found


def test_a_range_that_is_not_learned_stays():
    weight, spec = matrix(), GridSpec(4, strategy="group", group_size=8)
    rounding = LearnedRounding(weight, spec, "mse", learn_range=False)
    assert len(rounding.parameters()) == 1
    assert torch.equal(rounding.grid().scale, make_grid(weight, spec, "mse").scale)


def test_projected_adam_is_adam_within_bounds():
    free, bound = (torch.tensor([0.3, -0.2], requires_grad=True) for _ in range(2))
    plain = torch.optim.Adam([free], lr=0.2, betas=(0.9, 0.99))
    projected = ProjectedAdam([bound], 0.2, (0.9, 0.99), lambda: bound.data.clamp_(-0.25, 0.25))
    assert bound.tolist() == pytest.approx([0.3, -0.2])
    for parameter, optimizer in ((free, plain), (bound, projected)):
        parameter.grad = torch.tensor([-4.0, 0.01])
        optimizer.step()
    assert free.tolist() == pytest.approx([0.5, -0.4], abs=1e-4)
    assert bound.tolist() == [0.25, -0.25]


def test_signed_descent_moves_by_the_rate_and_projects():
    first, second = torch.zeros(3, requires_grad=True), torch.full((2,), 0.98, requires_grad=True)
    descent = SignedDescent(
        [{"params": [first], "lr": 0.25}, {"params": [second], "lr": 0.1}], 0.25, lambda: second.data.clamp_(0, 1)
    )
    first.grad, second.grad = torch.tensor([2.0, 0.0, -1e-9]), torch.tensor([-5.0, 5.0])
    descent.step()
    assert first.tolist() == [-0.25, 0.0, 0.25]
    assert second.tolist() == pytest.approx([1.0, 0.88])
