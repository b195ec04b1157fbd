"""Grids: shapes, exact agreement with compressed-tensors, error bounds and membership."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams

from hf_optim import compressed
from hf_optim.toolkit.quantization.grids import FLOAT8, GridSpec, fit_group_size, group_by_scale, make_grid

INTEGERS = [
    GridSpec(bits, "int", strategy, 16 if strategy == "group" else None, symmetric)
    for bits in range(2, 9)
    for strategy in ("tensor", "channel", "group")
    for symmetric in (True, False)
]
FLOATS = [GridSpec(8, "float", strategy) for strategy in ("tensor", "channel")]


def weights(rows: int = 24, columns: int = 48, seed: int = 0) -> torch.Tensor:
    drawn = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    drawn[3] += 2.0  # a row without negative values: asymmetric grids must still include zero
    drawn[5] = 0.0
    return drawn


@pytest.mark.parametrize("spec", INTEGERS + FLOATS, ids=str)
def test_grids_equal_those_of_compressed_tensors(spec):
    weight = weights()
    grid = make_grid(weight, spec)
    args = compressed.scheme_of(spec).weights
    low, high = torch.aminmax(group_by_scale(weight, spec), dim=-1)
    scale, zero = calculate_qparams(low.reshape(grid.scale.shape), high.reshape(grid.scale.shape), args)
    assert torch.equal(grid.scale, scale)
    if not spec.symmetric:
        assert grid.zero_point.dtype == zero.dtype
        assert torch.equal(grid.zero_point[scale > 1e-6], zero[scale > 1e-6])
    codes = grid.quantize(weight)
    assert torch.equal(grid.nearest(weight), fake_quantize(weight, grid.scale, grid.zero_point, args))
    assert torch.equal(codes.float(), quantize(weight, grid.scale, grid.zero_point, args))
    assert torch.equal(grid.dequantize(codes), dequantize(codes, grid.scale, grid.zero_point, args))


@pytest.mark.parametrize("spec", INTEGERS, ids=str)
def test_error_is_at_most_half_a_scale(spec):
    weight = weights()
    grid = make_grid(weight, spec)
    step = grid.scale.reshape(*group_by_scale(weight, spec).shape[:-1], 1)
    error = group_by_scale(grid.nearest(weight) - weight, spec).abs()
    rounding = torch.finfo(torch.float32).eps * weight.abs().max()
    assert bool((error <= step / 2 + rounding).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("spec", [spec for spec in INTEGERS if spec.symmetric], ids=str)
def test_a_signed_scale_puts_the_largest_value_on_the_lowest_code(spec, dtype):
    weight = weights().to(dtype)
    grid = make_grid(weight, spec, signed=True)
    parts = group_by_scale(weight.float(), spec)
    scale, codes = grid.scale.reshape(*parts.shape[:-1], 1), group_by_scale(grid.quantize(weight).float(), spec)
    low, high = (end.unsqueeze(-1) for end in torch.aminmax(parts, dim=-1))
    largest = torch.where(high > -low, high, low)
    rounding, some = torch.finfo(dtype).eps * 2, largest != 0  # a row of zeros has any scale
    torch.testing.assert_close(-(2.0 ** (spec.bits - 1)) * scale[some], largest[some], rtol=rounding, atol=0)
    assert bool((codes[(parts == largest) & (parts != 0)] == spec.low).all())
    assert torch.equal(scale < 0, high > -low)
    assert torch.equal(grid.scale, grid.scale.to(dtype).float())
    # The grid's far end is one scale beyond the largest code: only values of the other sign between them are clipped.
    clipped = (parts / scale > spec.high + 0.5) & (codes == spec.high)
    error = (grid.nearest(weight) - weight.float()).abs()
    inside = ~clipped.reshape(weight.shape)
    widest = scale.abs().expand(parts.shape).reshape(weight.shape)
    assert bool((error <= widest * (0.5 + rounding * 2**spec.bits))[inside].all())
    args = compressed.scheme_of(spec).weights
    assert torch.equal(grid.nearest(weight), fake_quantize(weight.float(), grid.scale, None, args))


def test_a_search_among_signed_scales_is_no_worse_than_either_sign():
    weight = weights()
    for bits in (2, 3, 4):
        spec = GridSpec(bits, "int", "group", 16)
        errors = [
            group_by_scale(grid.nearest(weight) - weight, spec).square().sum(-1)
            for grid in (make_grid(weight, spec, "mse", signed=True), make_grid(weight, spec, "mse"))
        ]
        mirrored = group_by_scale(make_grid(-weight, spec, "mse").nearest(-weight) + weight, spec).square().sum(-1)
        assert torch.equal(errors[0], torch.minimum(errors[1], mirrored))
        assert float(errors[0].sum()) < 0.97 * float(errors[1].sum())


@pytest.mark.parametrize("spec", INTEGERS + FLOATS, ids=str)
def test_values_are_on_the_grid_which_includes_zero(spec):
    weight = weights()
    weight[:, ::3] = 0.0
    grid = make_grid(weight, spec)
    codes = grid.quantize(weight)
    assert codes.dtype == (FLOAT8 if spec.type == "float" else torch.int8)
    assert codes.float().min() >= spec.low
    assert codes.float().max() <= spec.high
    assert torch.equal(grid.nearest(weight)[weight == 0], torch.zeros(int((weight == 0).sum())))
    assert torch.equal(grid.nearest(grid.nearest(weight)), grid.nearest(weight))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        (GridSpec(8, "int", "tensor"), (1,)),
        (GridSpec(8, "int", "channel"), (24, 1)),
        (GridSpec(4, "int", "group", 16), (24, 3)),
    ],
)
def test_scales_have_the_shapes_of_compressed_tensors(spec, shape):
    assert make_grid(weights(), spec).scale.shape == shape


def test_a_token_has_its_own_scale():
    inputs = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    grid = make_grid(inputs, GridSpec(8, "int", "token"))
    assert grid.scale.shape == (2, 5, 1)
    args = compressed.activation_args("int8")
    assert torch.equal(grid.nearest(inputs), fake_quantize(inputs, grid.scale, None, args))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scales_are_exact_in_the_dtype_in_which_they_are_stored(dtype):
    grid = make_grid(weights().to(dtype), GridSpec(4, "int", "group", 16, symmetric=False))
    assert grid.scale.dtype == torch.float32
    assert torch.equal(grid.scale.to(dtype).float(), grid.scale)
    assert bool((grid.scale > 0).all())


@pytest.mark.parametrize("spec", [s for s in INTEGERS if s.strategy != "tensor"], ids=str)
def test_mse_search_is_never_worse(spec):
    weight = weights()
    importance = torch.rand(48, generator=torch.Generator().manual_seed(1)) ** 4

    def error(grid, weigh):
        return group_by_scale((grid.nearest(weight) - weight).square() * weigh, spec).sum(-1)

    for weigh in (torch.ones(48), importance):
        found = error(make_grid(weight, spec, "mse", importance=weigh), weigh)
        assert bool((found <= error(make_grid(weight, spec), weigh) * (1 + 1e-5)).all())
    if spec.bits <= 4:
        assert error(make_grid(weight, spec, "mse"), 1.0).sum() < 0.98 * error(make_grid(weight, spec), 1.0).sum()


def test_importance_moves_the_scale():
    weight = torch.tensor([[0.1, 0.12, 0.09, 2.0]])
    spec = GridSpec(4, "int", "channel")
    plain = make_grid(weight, spec, "mse")
    steered = make_grid(weight, spec, "mse", importance=torch.tensor([1e6, 1e6, 1e6, 1e-6]))
    assert steered.scale < plain.scale


@pytest.mark.parametrize(
    ("width", "requested", "size"),
    [(352, 128, 88), (172, 128, 86), (172, 32, 4), (128, 128, 128), (64, 128, 64), (97, 32, 1)],
)
def test_group_size_is_the_largest_divisor(width, requested, size):
    assert fit_group_size(width, requested) == size


def test_rows_of_a_grid():
    weight = weights()
    grid = make_grid(weight, GridSpec(4, "int", "group", 16, symmetric=False))
    assert torch.equal(grid.rows(2, 7).quantize(weight[2:7]), grid.quantize(weight)[2:7])
