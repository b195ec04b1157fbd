"""Fake quantization: values, both gradients, and layers that are restored completely."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from hf_optim import compressed
from hf_optim.toolkit.quantization import fake_quant
from hf_optim.toolkit.quantization.fake_quant import (
    FakeQuantLinear,
    attach_fake_quant,
    detach_fake_quant,
    fake_quantize,
    initial_scale,
    round_scale,
)
from hf_optim.toolkit.quantization.grids import Grid, GridSpec, make_grid

DOUBLE = torch.float64
SPECS = [
    GridSpec(2),
    GridSpec(3, "int", "group", 7),
    GridSpec(4, "int", "group", 21, False),
    GridSpec(5, "int", "channel", None, False),
    GridSpec(8, "int", "tensor"),
    GridSpec(8, "float", "channel"),
    GridSpec(8, "float", "tensor"),
]


def weight(rows=9, columns=42, seed=0, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", SPECS)
def test_values_equal_the_decoded_codes(spec, dtype):
    layer = nn.Linear(42, 9, dtype=dtype)
    layer.weight.data = weight(dtype=dtype)
    fake = attach_fake_quant(layer, spec)
    expected = fake.fake_weight().detach()
    codes, grid = fake.quantize_weight()
    compressed.store(detach_fake_quant(fake), compressed.scheme_of(spec), codes, grid.scale, grid.zero_point)
    assert torch.equal(layer.weight, expected)
    assert expected.unique().numel() > 3


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_straight_through_gradient_equals_torch(bits, symmetric):
    """Identity inside the range, zero outside, per channel."""
    spec = GridSpec(bits, "int", "channel", None, symmetric)
    grid = make_grid(weight() * 0.6, spec)  # narrower than the values: some are clamped
    ours, theirs = weight().requires_grad_(), weight().requires_grad_()
    slope = weight(seed=1)
    (fake_quantize(ours, grid) * slope).sum().backward()
    zero = torch.zeros(9) if grid.zero_point is None else grid.zero_point[:, 0].float()
    other = torch.fake_quantize_per_channel_affine(theirs, grid.scale[:, 0], zero, 0, int(spec.low), int(spec.high))
    (other * slope).sum().backward()
    assert torch.equal(fake_quantize(ours, grid).detach(), grid.nearest(weight()))
    assert torch.equal(ours.grad, theirs.grad)
    assert 0 < int((ours.grad == 0).sum()) < ours.numel() / 2


def test_the_gradient_by_hand():
    values = torch.tensor([[-9.0, -8.6, -8.4, 0.2, 7.4, 7.6, 30.0]], requires_grad=True)
    fake_quantize(values, Grid(GridSpec(4), torch.ones(1, 1))).sum().backward()
    assert values.grad.tolist() == [[0, 0, 1, 1, 1, 0, 0]]


def test_the_largest_weight_of_a_minmax_grid_still_learns():
    for seed in range(20):
        values = weight(seed=seed).requires_grad_()
        fake_quantize(values, make_grid(values.detach(), GridSpec(2))).sum().backward()
        assert bool((values.grad == 1).all())


@pytest.mark.parametrize(
    "spec", [GridSpec(3, "int", "group", 7), GridSpec(4), GridSpec(2, "int", "channel", None, False)]
)
def test_the_gradient_of_a_learned_scale_is_equation_3(spec):
    values = weight(dtype=DOUBLE).requires_grad_()
    made = make_grid(values.detach() * 0.7, spec)
    step = made.scale.clone().requires_grad_()
    slope = weight(seed=2, dtype=DOUBLE)
    (fake_quantize(values, Grid(spec, step, made.zero_point)) * slope).sum().backward()
    size = spec.group_size or 42
    for row in range(9):
        for group in range(42 // size):
            s = float(made.scale[row, group])
            z = 0.0 if made.zero_point is None else float(made.zero_point[row, group])
            total = 0.0
            for j in range(group * size, (group + 1) * size):
                ratio, g = float(values.detach()[row, j]) / s, float(slope[row, j])
                inside = spec.low - z < ratio < spec.high - z
                clamped = spec.low - z if ratio <= spec.low - z else spec.high - z
                total += g * (round(ratio) - ratio if inside else clamped)
                assert float(values.grad[row, j]) == (g if inside else 0.0)
            total /= (size * spec.high) ** 0.5
            assert float(step.grad[row, group]) == pytest.approx(total, rel=1e-9)


def test_the_initial_scale():
    values = weight(dtype=DOUBLE)
    expected = 2 * values.view(9, 6, 7).abs().mean(-1) / 3**0.5
    assert torch.allclose(initial_scale(values, GridSpec(3, "int", "group", 7)), expected, rtol=1e-12)
    assert initial_scale(values, GridSpec(3, "int", "tensor")).shape == (1,)


def test_a_scale_is_stored_positive_and_exact():
    step = torch.tensor([0.1, -1.0, 1e-30], requires_grad=True)
    found = round_scale(step, torch.bfloat16, GridSpec(8))
    assert bool((found > 0).all())
    assert torch.equal(found.bfloat16().float(), found)
    found.sum().backward()
    assert step.grad.tolist() == [1, 1, 1]


def test_gradient_descent_on_the_scale_lowers_the_error():
    values, spec = weight(32, 64), GridSpec(3)
    step = initial_scale(values, spec).mul(2.5).requires_grad_()
    optimizer = torch.optim.Adam([step], lr=0.02)

    def error():
        return (fake_quantize(values, Grid(spec, step)) - values).square().mean()

    before = float(error().detach())
    for _ in range(150):
        optimizer.zero_grad()
        error().backward()
        optimizer.step()
    minmax = float((make_grid(values, spec).nearest(values) - values).square().mean())
    assert float(error().detach()) < 0.5 * before
    assert float(error().detach()) < minmax


class Twice(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


class TestLayer:
    def test_state_dicts_do_not_contain_learned_scales(self):
        layer = nn.Linear(8, 4)
        before = copy.deepcopy(layer.state_dict())
        fake = attach_fake_quant(layer, GridSpec(4))
        fake.learn_scale(fake.grid())
        fake.input_step = nn.Parameter(torch.ones(1))
        assert layer.state_dict().keys() == before.keys()
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias", "weight_step", "input_step"}
        layer.load_state_dict(before, strict=True)
        assert detach_fake_quant(fake) is layer
        assert type(layer) is nn.Linear
        assert {name for name, _ in layer.named_parameters()} == {"weight", "bias"}
        assert vars(layer).keys() == vars(nn.Linear(8, 4)).keys()

    def test_scales_follow_the_weights(self):
        fake = attach_fake_quant(nn.Linear(8, 4), GridSpec(4))
        first = fake.grid()
        fake.weight.data = fake.weight.data * 2  # does not change the version counter of autograd
        assert torch.equal(fake.grid().scale, 2 * first.scale)

    def test_a_copy_has_its_own_scales(self):
        fake = attach_fake_quant(nn.Linear(8, 4), GridSpec(4))
        fake.learn_scale(fake.grid())
        twin = copy.deepcopy(fake)
        with torch.no_grad():
            twin.weight_step.mul_(3)
        assert torch.equal(twin.grid().scale, 3 * fake.grid().scale)

    def test_a_latent_weight_replaces_the_weight(self):
        latent = weight(4, 8).requires_grad_()
        fake = attach_fake_quant(nn.Linear(8, 4, dtype=torch.bfloat16), GridSpec(4), latent=latent)
        out = fake(torch.randn(3, 8, dtype=torch.bfloat16))
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        assert bool(latent.grad.any())
        assert fake.weight.grad is None
        assert torch.equal(fake.grid().scale, make_grid(latent.detach(), GridSpec(4), dtype=torch.bfloat16).scale)

    def test_zeros_stay_zero(self):
        for spec in SPECS:
            layer = nn.Linear(42, 9)
            layer.weight.data = weight() + 0.5
            layer.weight.data[::2, ::3] = 0
            assert not attach_fake_quant(layer, spec).fake_weight()[::2, ::3].any()

    def test_a_layer_with_its_own_forward_is_refused(self):
        with pytest.raises(ValueError, match="Twice with its own forward"):
            attach_fake_quant(Twice(4, 4), GridSpec(4))

    def test_an_inactive_layer_computes_as_linear(self):
        layer, x = nn.Linear(8, 4), torch.randn(2, 8)
        expected = layer(x)
        fake = attach_fake_quant(layer, GridSpec(2), active=False)
        assert torch.equal(fake(x), expected)
        fake.active = True
        assert not torch.equal(fake(x), expected)
        assert isinstance(fake_quant.fake_quant_layers([("a", fake)])["a"], FakeQuantLinear)
