"""The column recursion: the kernel of a block and the recursion over blocks, against the specification in float64."""

from __future__ import annotations

import pytest
import torch
from interpreting import CUDA, on_triton

from hf_optim_kernels.column_recursion import naive

DOUBLE = torch.float64
# rows, columns, group, bits, zero points: rows and columns that fill no tile, one group per row.
CASES = [(32, 128, 32, 4, False), (7, 48, 16, 2, True), (33, 43, 43, 8, False), (40, 150, 75, 3, True)]


def random_case(rows, columns, group, bits, zero, dtype=torch.float32, device="cpu", seed=0):
    """Arguments of ``recurse`` with a quarter of the weights pruned; scales cover the weights."""
    g = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, dtype=DOUBLE, generator=g)
    hessian = mixing @ mixing.T / columns + 0.1 * torch.eye(columns, dtype=DOUBLE)
    order = torch.randperm(columns, generator=g)
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian[order][:, order]), upper=True)
    weight = torch.randn(rows, columns, generator=g).to(dtype)
    weight[torch.rand(rows, columns, generator=g) < 0.25] = 0.0
    low, high = -(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1
    parts = weight.float().unflatten(1, (-1, group))
    scale = (parts.amax(-1) - parts.amin(-1)).clamp_min(0.1) / (high - low)
    zeros = (low - parts.amin(-1) / scale).round().clamp(low, high).to(torch.int8) if zero else None
    whole = (weight, upper.float(), order, scale, zeros, group, low, high)
    return [value.to(device) if isinstance(value, torch.Tensor) else value for value in whole]


def in_float64(weight, upper, order, scale, zero, *rest):
    return naive.recurse(weight.double(), upper.double(), order, scale.double(), zero, *rest)


def differing(codes, reference):
    return float((codes != reference).double().mean())


@pytest.mark.parametrize("zero", [False, True])
def test_the_specification_is_optimal_brain_surgery_in_a_fixed_order(zero):
    """Each column: the inverse Hessian of the columns that are left, made anew."""
    weight, upper, order, scale, zeros, group, low, high = random_case(6, 32, 8, 3, zero)
    upper = upper.double()
    hessian = torch.linalg.inv(upper.T @ upper)  # over columns in order
    found = naive.recurse(weight.double(), upper, order, scale.double(), zeros, group, low, high)
    left = weight.double()[:, order]
    for q, column in enumerate(order.tolist()):
        step = scale[:, column // group].double()
        shift = torch.zeros_like(step) if zeros is None else zeros[:, column // group].double()
        code = (left[:, q] / step + shift).clamp(low, high).round()
        code = torch.where(weight[:, column] != 0, code, shift)
        assert torch.equal(found[:, column].double(), code)
        inverse = torch.linalg.inv(hessian[q:, q:])
        left[:, q:] -= torch.outer(left[:, q] - (code - shift) * step, inverse[0] / inverse[0, 0])


def test_with_a_diagonal_factor_it_rounds_to_nearest():
    weight, _, order, scale, zeros, group, low, high = random_case(16, 64, 16, 4, True)
    found = naive.recurse(weight, torch.eye(64), order, scale, zeros, group, low, high)
    step, shift = scale.repeat_interleave(group, 1), zeros.float().repeat_interleave(group, 1)
    assert torch.equal(found.float(), (weight / step + shift).clamp(low, high).round())


@on_triton
@pytest.mark.parametrize("sizes", CASES)
def test_the_kernel_equals_the_specification(device, sizes):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(*sizes, device=device)
    found = launch.recurse(*case)
    assert found.dtype == torch.int8
    # float32: a value near the middle between two codes may go either way, and what follows it in its row with it.
    assert differing(found, in_float64(*case)) < 0.002
    assert bool((found[case[0] == 0] == (0 if case[4] is None else spread(case)[case[0] == 0])).all())


def spread(case):
    return case[4].repeat_interleave(case[5], 1)


@on_triton
@pytest.mark.parametrize("sizes", CASES)
def test_another_start_keeps_the_zeros_of_the_weight(device, sizes):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(*sizes, device=device)
    start = case[0] + 0.3 * torch.randn(case[0].shape, generator=torch.Generator().manual_seed(3)).to(device)
    found = launch.recurse(*case, start=start)
    assert differing(found, in_float64(*case, start.double())) < 0.002
    assert differing(found, launch.recurse(*case)) > 0.1
    assert bool((found[case[0] == 0] == (0 if case[4] is None else spread(case)[case[0] == 0])).all())


@on_triton
@pytest.mark.parametrize("block_size", [1, 7, 1000])
def test_blocks_of_any_size(device, block_size):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(20, 40, 20, 4, True, device=device)
    assert differing(launch.recurse(*case, block_size=block_size), in_float64(*case)) < 0.002


@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits(device, dtype):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(24, 48, 24, 4, False, dtype=dtype, device=device)
    assert differing(launch.recurse(*case), in_float64(*case)) < 0.002


@on_triton
def test_double_precision_is_refused(device):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(4, 32, 8, 4, False, device=device)
    case[1] = case[1].double()
    with pytest.raises(ValueError, match="float32"):
        launch.recurse(*case)


@pytest.mark.gpu
@pytest.mark.parametrize("device", [CUDA])
def test_a_layer_of_a_large_model(device):
    from hf_optim_kernels.column_recursion import launch

    case = random_case(512, 4096, 128, 4, True, dtype=torch.bfloat16, device=device)
    assert differing(launch.recurse(*case), in_float64(*case)) < 0.005
