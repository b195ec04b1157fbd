"""The refinement of GPTQ's codes and scales: coordinate descent and least squares, against their definitions."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_optim.toolkit.quantization import GridSpec, damped, descent_factor, make_grid, output_error, refit_scales
from hf_optim_plugins.quantization._column_recursion import refine
from hf_optim_plugins.quantization.gptq import column_order, quantize_columns

DOUBLE = torch.float64
SPECS = [GridSpec(3), GridSpec(4, "int", "group", 16), GridSpec(2, "int", "group", 8, False)]


def problem(rows=10, columns=48, tokens=300, seed=0):
    """A weight [out, in] with zeros, and the second moment of correlated inputs, one of them dead; float64."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=DOUBLE, generator=generator)
    x = torch.randn(tokens, columns, dtype=DOUBLE, generator=generator) @ mixing
    x[:, 7] = 0
    weight = torch.randn(rows, columns, dtype=DOUBLE, generator=generator)
    weight[weight.abs() < 0.3] = 0.0
    return weight, x.T @ x / tokens


def sweep_by_definition(weight, codes, grid, hessian, order):
    """Set each column in turn to the grid point that is best while all others stay."""
    zero = grid.quantize(torch.zeros_like(weight))
    codes = codes.clone()
    for column in order.tolist():
        gradient = (weight - grid.dequantize(codes)) @ hessian[:, column]
        target = torch.zeros_like(weight)
        target[:, column] = grid.dequantize(codes)[:, column] + gradient / hessian[column, column]
        best = grid.quantize(target)[:, column]
        codes[:, column] = torch.where(weight[:, column] == 0, zero[:, column], best)
    return codes


def rounds_of(weight, codes, grid, hessian, order, rounds=1, block_size=128):
    return refine(weight, codes, grid, hessian, descent_factor(hessian, order), order, rounds, block_size)


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("block_size", [1, 7, 128])
@pytest.mark.parametrize("start", ["gptq", "nearest"])
def test_a_round_is_a_refit_and_a_sweep_of_coordinate_descent(spec, block_size, start):
    weight, hessian = problem()
    grid, order = make_grid(weight, spec), column_order(hessian, True)
    codes = quantize_columns(weight, hessian, grid) if start == "gptq" else grid.quantize(weight)
    with damped(hessian, 0.01):
        found, fitted = rounds_of(weight, codes, grid, hessian, order, 1, block_size)
        expected = refit_scales(weight, codes, grid, hessian)
        assert torch.equal(fitted.scale, expected.scale)
        assert not torch.equal(fitted.scale, grid.scale)
        assert torch.equal(found, sweep_by_definition(weight, codes, expected, hessian, order))
    assert not torch.equal(found, codes)
    assert bool((fitted.dequantize(found)[weight == 0] == 0).all())


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_round_raises_the_error_of_a_row(spec, dtype):
    weight, hessian = problem(rows=40)
    weight = weight.to(dtype)
    grid, order = make_grid(weight, spec), column_order(hessian, True)
    codes = quantize_columns(weight, hessian, grid)
    first = output_error(weight, grid.dequantize(codes), hessian)

    def errors():
        # In float64, since values rounded to float32 are not those that the steps compare.
        delta = weight.double() - replace(grid, scale=grid.scale.double()).dequantize(codes)
        return ((delta @ hessian) * delta).sum(1)

    with damped(hessian, 0.01):
        for _ in range(4):
            before = errors()
            codes, grid = rounds_of(weight, codes, grid, hessian, order)
            assert bool((errors() <= before * (1 + 1e-9) + 1e-12).all())
    assert torch.equal(grid.scale, grid.scale.to(dtype).to(grid.scale.dtype))  # what a checkpoint stores
    assert output_error(weight, grid.dequantize(codes), hessian) < 0.95 * first


def test_the_scale_of_a_row_is_that_of_least_squares():
    weight, hessian = problem()
    grid = make_grid(weight, GridSpec(3))
    codes = quantize_columns(weight, hessian, grid)
    root = torch.linalg.cholesky(hessian + 1e-9 * torch.eye(len(hessian), dtype=DOUBLE))
    found = refit_scales(weight, codes, grid, root @ root.T).scale
    for row, code, scale in zip(weight, codes, found, strict=True):
        best = torch.linalg.lstsq((code.double() @ root)[:, None], (row @ root)[:, None]).solution
        torch.testing.assert_close(scale, best[0])


def test_scales_that_would_not_be_positive_stay():
    weight, hessian = problem()
    grid = make_grid(weight, GridSpec(3, "int", "group", 16))
    codes = grid.quantize(weight)
    for opposite in (-codes.clamp(min=-3), torch.zeros_like(codes)):
        assert torch.equal(refit_scales(weight, opposite, grid, hessian.diagonal().diag()).scale, grid.scale)


def test_damping_leaves_the_hessian_as_it_was():
    _, hessian = problem()
    before = hessian.clone()
    with damped(hessian, 0.1) as inside:
        assert bool((inside.diagonal() > before.diagonal()).all())
    assert torch.equal(hessian, before)


def test_the_factor_is_that_of_its_equation():
    _, hessian = problem()
    order = column_order(hessian, True)
    with damped(hessian, 0.01):
        permuted = hessian[order][:, order]
        expected = permuted.diagonal().diag() @ torch.linalg.inv(permuted.triu())
        found = descent_factor(hessian, order)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found.diagonal(), torch.ones(len(found), dtype=DOUBLE))
