"""The grouped product that torch.compile does not look into: its values, its gradients, and what compilers are told."""

from __future__ import annotations

import pytest
import torch

from hf_optim.toolkit.experts.opaque_product import opaque_product

CASES = {"all": [3, 3, 7, 9], "some": [0, 4, 4, 6], "nobody": [0, 0, 0, 0]}  # of 9 rows, groups without one among them


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_product_and_gradients_are_those_of_one_matrix_after_the_other(case, dtype):
    g = torch.Generator().manual_seed(0)
    rows, weight, grad = (torch.randn(*shape, generator=g).to(dtype) for shape in ((9, 8), (4, 8, 6), (9, 6)))
    weight = weight.transpose(1, 2).contiguous().transpose(1, 2)  # as a layer's matrices are
    stops = CASES[case]
    ends = torch.tensor(stops, dtype=torch.int32)
    given = [value.clone().requires_grad_() for value in (rows, weight)]
    found = opaque_product(*given, ends)
    found.backward(grad)
    wanted = [value.clone().requires_grad_() for value in (rows, weight)]
    parts = [wanted[0][a:b] @ wanted[1][i] for i, (a, b) in enumerate(zip([0, *stops], stops, strict=False))]
    right = torch.cat([*parts, wanted[0][stops[-1] :].new_zeros(9 - stops[-1], 6)])
    (right * grad).sum().backward()
    close = {"rtol": 1e-12, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 2e-3, "atol": 2e-3}
    torch.testing.assert_close(found, right, **close)
    for own, other in zip(given, wanted, strict=True):
        torch.testing.assert_close(own.grad, torch.zeros_like(own) if other.grad is None else other.grad, **close)


@pytest.mark.parametrize("case", CASES)
def test_the_operator_keeps_what_compilers_are_told(case):
    rows, weight = torch.randn(9, 8, requires_grad=True), torch.randn(4, 8, 6, requires_grad=True)
    torch.library.opcheck(opaque_product, (rows, weight, torch.tensor(CASES[case], dtype=torch.int32)))
