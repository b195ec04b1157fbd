"""Scales in half precision: no row underflows to zero, none decodes to infinity, and every code is the nearest."""

import itertools

import pytest
import torch

from hf_optim.toolkit.quantization import GridSpec, group_qparams, make_grid, qparams_from_range, storable_scale
from hf_optim.toolkit.quantization.fake_quant import initial_scale, round_scale
from hf_optim.toolkit.quantization.scales import smallest_scale

HALVES = (torch.float16, torch.bfloat16)
MAGNITUDES = (1e-8, 6e-8, 1e-7, 3e-7, 1e-6, 3e-6, 1e-5, 1e-4, 1e-2, 1.0, 1e2, 1e4, 3e4, 6e4, 65504.0)
SPECS = [GridSpec(bits, "int", "channel", None, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]
SPECS += [GridSpec(bits, "int", "group", 16, symmetric) for bits in (4, 8) for symmetric in (True, False)]
SPECS += [GridSpec(8, "float", "channel"), GridSpec(8, "float", "tensor"), GridSpec(4, "int", "tensor")]


def rows(dtype, magnitude):
    """Return rows whose largest value has this magnitude: normal, one-sided, one outlier, one sign, zeros."""
    torch.manual_seed(0)
    x = torch.randn(6, 64)
    x[1] = x[1].abs()
    x[2] = -x[2].abs()
    x[3] *= 1e-3
    x[3, 5] = 1.0
    x[4] = x[4].sign()
    x[5, ::2] = 0
    x = x / x.abs().amax(1, keepdim=True) * magnitude
    return torch.cat([x, torch.zeros(1, 64)]).to(dtype)


def ulp(values, dtype):
    """Return the spacing of the numbers of a dtype at the largest magnitude of each row."""
    info = torch.finfo(dtype)
    exponent = values.abs().amax(-1, keepdim=True).clamp(min=info.smallest_normal).log2().floor()
    return info.eps * 2**exponent


@pytest.mark.many
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_rows_of_any_magnitude_keep_the_precision_of_their_grid(spec, dtype):
    for magnitude, observer in itertools.product(MAGNITUDES, ("minmax", "mse")):
        weight = rows(dtype, magnitude)
        grid = make_grid(weight, spec, observer)
        assert torch.equal(grid.scale.to(dtype).to(grid.scale.dtype), grid.scale)
        assert bool((grid.scale > 0).all())
        codes = grid.quantize(weight)
        assert bool((codes != codes[6, 0]).any()) == bool(weight.any())
        # The arithmetic of compressed-tensors: a product in the stored dtype.
        decoded = grid.dequantize(codes).to(dtype)
        assert bool(decoded.isfinite().all()), magnitude
        assert bool((decoded[6] == 0).all())
        if observer == "mse":
            continue
        error = (decoded.double() - weight.double()).abs().amax(1, keepdim=True)
        largest = weight.double().abs()
        largest = largest.amax() if spec.strategy == "tensor" else largest.amax(1, keepdim=True)
        # Half a step; the range of an asymmetric grid is at most twice the largest value. Rounding the scale moves the
        # last code by its share of the codes.
        step = 2.0**-3 * largest if spec.type == "float" else 2 * largest / (spec.high - spec.low)
        slack = largest * torch.finfo(dtype).eps + ulp(weight.double(), dtype)
        capped = (-spec.low * step).max() > torch.finfo(dtype).max * 0.99  # the last code would be infinite
        assert bool((error <= (1.5 if capped else 0.5) * step * (1 + 1e-6) + slack).all()), (magnitude, error.flatten())


def test_a_small_row_of_float16_is_exact_where_its_numbers_are_codes():
    steps = torch.arange(-50, 51).repeat(2, 1)
    weight = (steps * 2.0**-24).half()
    assert torch.equal(make_grid(weight, GridSpec(8)).nearest(weight), weight.float())
    assert torch.equal(make_grid(weight, GridSpec(8, symmetric=False)).nearest(weight), weight.float())


def test_scales_are_rounded_up_below_the_normal_numbers_and_down_at_the_limit():
    step = 2.0**-24
    exact = torch.tensor([0.0, 1e-12, 1.4 * step, 3.0 * step, 700.2 * step, 0.1, 1e5])
    found = storable_scale(exact, torch.float16, 128)
    assert found.tolist() == [
        torch.finfo(torch.float16).eps, step, 2 * step, 3 * step, 701 * step, float(torch.tensor(0.1).half()), 511.75
    ]  # fmt: skip


def test_smallest_scales():
    assert smallest_scale(torch.float16) == 2.0**-24
    assert smallest_scale(torch.bfloat16) == smallest_scale(torch.float32) == 2.0**-126


@pytest.mark.parametrize("dtype", HALVES)
def test_ranges_of_activations(dtype):
    for magnitude in MAGNITUDES:
        for spec in (
            GridSpec(8, "int", "tensor"),
            GridSpec(8, "int", "tensor", None, False),
            GridSpec(8, "float", "tensor"),
        ):
            top = torch.tensor([magnitude]).to(dtype).float()
            scale, zero = qparams_from_range(-top, top * 0.5, spec, dtype)
            offset = 0 if zero is None else int(zero)
            extent = max(spec.high - offset, offset - spec.low)
            assert float(scale) > 0
            assert float(scale) * extent <= torch.finfo(dtype).max
    low, high = torch.tensor([-1e-7, 0.0, -6e4, 0.0]), torch.tensor([2e-7, 1e-6, 6e4, 6e4])
    scale, zero = group_qparams(low, high, torch.tensor([0, 0, 1, 1]), dtype)
    assert bool((scale > 0).all())
    assert bool(scale.to(dtype).isfinite().all())


def test_a_range_wider_than_float32():
    top = torch.tensor([3e38])
    scale, _ = qparams_from_range(-top, top, GridSpec(8, symmetric=False), torch.float32)
    assert bool(scale.isfinite().all())
    assert bool(((scale * 127).isfinite()).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_learned_scales_follow_small_weights(dtype):
    """The scale of small weights is far below the eps of the dtype, which is a relative precision."""
    values = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) * 1e-3).to(dtype)
    wanted = 2 * values.float().abs().mean(1, keepdim=True) / 127**0.5
    found = initial_scale(values, GridSpec(8))
    assert torch.allclose(found, wanted, rtol=1e-2)
    assert torch.allclose(round_scale(wanted, dtype, GridSpec(8)), wanted, rtol=1e-2)
    assert float(round_scale(torch.tensor([-1.0]), dtype, GridSpec(8))) == smallest_scale(dtype)
