"""Grids of 4-bit floats against a brute-force rounding in float64, and against what compressed-tensors decodes."""

from __future__ import annotations

import itertools

import pytest
import torch
from compressed_tensors.quantization.utils.fp4_utils import cast_to_fp4

from hf_optim.errors import NumericalError
from hf_optim.toolkit.quantization import GridSpec, LearnedRounding, float4, make_grid

NUMBERS = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SPECS = {"nvfp4": GridSpec(4, "nvfp4", "group", 16), "mxfp4": GridSpec(4, "mxfp4", "group", 32)}


def nearest(value: float) -> float:
    """The nearest number, at a tie the one whose last bit is 0, beyond 6 the largest."""
    size = min(abs(value), 6.0)
    best = min(range(8), key=lambda index: (abs(NUMBERS[index] - size), index % 2))
    return -NUMBERS[best] if value < 0 else NUMBERS[best]


def random_weight(rows=6, columns=96, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, columns, generator=g, dtype=torch.float64) * torch.rand(rows, 1, generator=g)).to(dtype)


def test_rounding_is_to_the_nearest_number_with_ties_to_even():
    middles = [(a + b) / 2 for a, b in itertools.pairwise(NUMBERS)]
    values = [sign * value for value in [*NUMBERS, *middles, 5.9, 6.5, 100.0] for sign in (1, -1)]
    values += torch.linspace(-7, 7, 1001, dtype=torch.float64).tolist()
    given = torch.tensor(values, dtype=torch.float64)
    found = float4.round_doubled((2 * given).clamp(-12, 12)) / 2
    assert found.tolist() == [nearest(value) for value in values]
    assert torch.equal(found.float(), cast_to_fp4(given.float().clamp(-6, 6)))


def test_patterns_are_sign_exponent_and_mantissa():
    patterns = torch.arange(16, dtype=torch.uint8)
    wanted = []
    for pattern in range(16):
        exponent, mantissa = (pattern >> 1) & 3, pattern & 1
        size = mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        wanted.append(-size if pattern >> 3 else size)
    numbers = float4.to_numbers(patterns, torch.float64)
    assert numbers.tolist() == wanted
    assert torch.signbit(numbers).tolist() == [pattern >= 8 for pattern in range(16)]
    assert torch.equal(float4.to_patterns(2 * numbers), patterns)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_weight_is_rounded_to_the_nearest_multiple_of_its_scale(kind, dtype):
    weight = random_weight(dtype=dtype)
    weight[0, :32] = 0
    grid = make_grid(weight, SPECS[kind])
    codes = grid.quantize(weight)
    size = float4.GROUPS[kind]
    assert codes.dtype == torch.int8
    assert not codes[0, :32].any()
    for row, column in [(1, 0), (2, 17), (3, 95), (5, 40)]:
        scale = 2 * float(grid.scale[row, column // size].double())
        assert int(codes[row, column]) == 2 * nearest(float(weight[row, column].double()) / scale)
    assert torch.equal(grid.nearest(grid.nearest(weight)), grid.nearest(weight))


def test_scales_of_nvfp4_are_e4m3_over_one_number():
    weight = random_weight(dtype=torch.float32)
    weight[1, 16:32] *= 1e-7  # a scale below the smallest e4m3 number becomes that one
    grid = make_grid(weight, SPECS["nvfp4"])
    assert float(grid.global_scale) == pytest.approx(448 * 6 / float(weight.abs().max()), rel=1e-7)
    stored = float4.stored_scale(grid.scale, "nvfp4", grid.spec.global_scale)
    assert stored.dtype == torch.float8_e4m3fn
    assert torch.equal(stored.float() / grid.global_scale, 2 * grid.scale)
    assert float(stored.float().max()) == 448
    assert float(stored[1, 1].float()) == 2.0**-9
    largest = weight.view(6, -1, 16).abs().amax(-1)
    kept = torch.ones_like(largest, dtype=torch.bool)
    kept[1, 1] = False
    # Three bits of mantissa: a sixteenth.
    assert ((6 * 2 * grid.scale / largest)[kept] - 1).abs().max() <= 1 / 16


def test_scales_of_mxfp4_are_powers_of_two_that_keep_the_largest_at_4_or_6():
    weight = random_weight(rows=16, dtype=torch.float32)
    grid = make_grid(weight, SPECS["mxfp4"])
    scale = 2 * grid.scale
    assert torch.equal(torch.frexp(scale).mantissa, torch.full_like(scale, 0.5))
    ratio = weight.view(16, -1, 32).abs().amax(-1) / scale
    assert float(ratio.min()) >= 3.5 * (1 - 1e-6)
    assert float(ratio.max()) < 7
    assert set(grid.quantize(weight).view(16, -1, 32).abs().amax(-1).unique().tolist()) <= {8, 12}
    stored = float4.stored_scale(grid.scale, "mxfp4", None)
    assert stored.dtype == torch.float8_e8m0fnu
    assert torch.equal(stored.float(), scale)


@pytest.mark.parametrize("kind", SPECS)
def test_the_search_does_not_lose_to_the_full_range(kind):
    weight = random_weight(dtype=torch.float32, seed=3)
    error = {
        observer: (make_grid(weight, SPECS[kind], observer).nearest(weight) - weight).square().view(6, -1, 32).sum(-1)
        for observer in ("minmax", "mse")
    }
    assert (error["mse"] <= error["minmax"] * (1 + 1e-5)).all()
    assert error["mse"].sum() < error["minmax"].sum()


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(kind, value):
    weight = random_weight()
    weight[0, 0] = value
    with pytest.raises(NumericalError, match="no NaN"):
        make_grid(weight, SPECS[kind])


def test_a_part_has_the_grid_of_the_whole():
    weight = random_weight(dtype=torch.float32)
    spec = SPECS["nvfp4"].fitted(weight)
    whole, part = make_grid(weight, spec), make_grid(weight[2:4], spec)
    assert torch.equal(part.scale, whole.scale[2:4])
    assert not torch.equal(make_grid(weight[2:4], SPECS["nvfp4"]).scale, part.scale)


@pytest.mark.parametrize("kind", SPECS)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_learned_rounding_begins_at_the_nearest_and_an_offset_moves_one_code(kind, observer):
    weight = random_weight(dtype=torch.bfloat16, seed=1)
    made = LearnedRounding(weight, SPECS[kind], observer)
    codes, grid = made.quantize()
    wanted = make_grid(weight, SPECS[kind], observer)
    assert torch.equal(codes, wanted.quantize(weight))
    assert torch.equal(grid.scale, wanted.scale.float())
    assert torch.equal(made.fake_weight(), grid.dequantize(codes).to(torch.bfloat16))
    with torch.no_grad():
        made.offset.fill_(0.5)
    index = {
        code: place
        for place, code in enumerate(sorted({*codes.unique().tolist(), *range(-4, 5), 6, 8, 12, -6, -8, -12}))
    }
    up, _ = made.quantize()
    moves = [index[b] - index[a] for a, b in zip(codes.flatten().tolist(), up.flatten().tolist(), strict=True)]
    assert set(moves) == {0, 1}
    loss = made.fake_weight().float().square().sum()
    loss.backward()
    assert made.offset.grad is not None
    assert made.offset.grad.abs().sum() > 0
    assert made.shares[0].grad.abs().sum() > 0
