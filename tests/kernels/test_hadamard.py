"""Hadamard transforms: the specification against the matrix, and the operators against the specification."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_triton

from hf_optim_kernels.hadamard import cpu, naive, op

SIZES = [(1, 1), (2, 2), (12, 4), (64, 64), (96, 32), (352, 32), (896, 128)]


def rows(channels, dtype=torch.float32, device="cpu", count=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, count, channels, generator=generator).to(dtype).to(device)


@pytest.mark.parametrize("size", [1, 2, 4, 16])
def test_the_matrix_is_sylvesters(size):
    expected = torch.ones(1, 1, dtype=torch.float64)
    while len(expected) < size:
        expected = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), expected)
    assert torch.equal(naive.matrix(size), expected)


@pytest.mark.parametrize(("channels", "block"), SIZES)
def test_the_cpu_equals_the_specification_and_the_transform_is_its_own_inverse(channels, block):
    x = rows(channels, torch.float64)
    found = cpu.hadamard(x, block)
    torch.testing.assert_close(found, naive.hadamard(x, block), rtol=0, atol=1e-13)
    torch.testing.assert_close(cpu.hadamard(found, block), x, rtol=0, atol=1e-13)
    torch.testing.assert_close(op.hadamard(x, block), found, rtol=0, atol=1e-13)
    if block > 1:
        assert not torch.allclose(found, x)


@pytest.mark.parametrize("block", [0, 3, 16])
def test_a_block_that_does_not_fit_is_refused(block):
    for function in (naive.hadamard, op.hadamard, op.hadamard_int8):
        with pytest.raises(ValueError, match="power of two that divides 24"):
            function(rows(24), block)


def test_gradients_and_fake_tensors():
    x = rows(24, torch.float64).requires_grad_(True)
    assert torch.autograd.gradcheck(lambda t: op.hadamard(t, 8), (x,))
    torch.library.opcheck(op.hadamard, (rows(24), 8))
    torch.library.opcheck(op.hadamard_int8, (rows(24), 8))


@on_triton
@pytest.mark.parametrize(("channels", "block"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_kernel_equals_the_specification(device, channels, block, dtype):
    x = rows(channels, dtype, device)
    found, wanted = op.hadamard(x, block), naive.hadamard(x.double(), block)
    assert found.dtype == dtype
    assert found.shape == x.shape
    # Half of the last digit, or all of it where the interpreter cuts.
    bound = torch.finfo(dtype).eps * float(wanted.abs().max()) + 1e-6
    assert float((found.double() - wanted).abs().max()) <= bound


@on_triton
@pytest.mark.parametrize(("channels", "block"), SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_quantizes_the_rows_that_it_transformed(device, channels, block, dtype):
    x = rows(channels, dtype, device)
    codes, scales = op.hadamard_int8(x, block)
    wanted, expected = naive.hadamard_int8(x, block)
    cut = device == "cpu" and dtype == torch.bfloat16  # the interpreter cuts to bfloat16 instead of rounding
    # Sums in another order can round to a neighbour, and fall on the other side of a tie. Cutting loses a digit of the
    # row and one of the scale: 2^-6 of a code of 128.
    rounding = 2**-6 if cut else 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(scales, expected, rtol=rounding, atol=1e-7)
    assert int((codes.int() - wanted.int()).abs().max()) <= (3 if cut else 1)
    # The largest value of a row lies on a tie, which decides most codes of short rows.
    assert cut or channels < 32 or float((codes != wanted).float().mean()) < 0.05


@on_triton
def test_rows_with_a_stride_and_no_rows(device):
    x = rows(32, device=device)[..., :24]
    torch.testing.assert_close(op.hadamard(x, 8), naive.hadamard(x, 8), rtol=1e-5, atol=1e-6)
    assert op.hadamard(x[:0], 8).shape == (0, 3, 24)
    codes, scales = op.hadamard_int8(torch.zeros(2, 8, device=device), 8)
    assert not codes.any()
    assert bool((scales > 0).all())
