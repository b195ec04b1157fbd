"""The largest numbers of short rows in one launch."""

from __future__ import annotations

import pytest
import torch
from interpreting import EVERYWHERE

pytest.importorskip("triton")

from hf_optim_kernels.experts.choose import choose, takes


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize(("rows", "columns", "k"), [(1, 128, 8), (3, 8, 2), (5, 60, 6), (2, 256, 1), (2, 5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_they_are_those_of_topk(rows, columns, k, dtype, device):
    random = torch.Generator().manual_seed(columns)
    x = torch.randn(rows, columns, generator=random).to(device, dtype)
    values, indices = choose(x, k)
    assert indices.dtype == torch.int64
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(values, x.gather(1, indices))
    assert all(len(set(row)) == k for row in indices.tolist())
    strided = torch.stack([x, x], dim=-1)[..., 0]
    assert torch.equal(choose(strided, k)[1], indices)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_equal_numbers_keep_their_order_and_the_largest_is_not_a_number(device):
    x = torch.tensor(
        [[0.0, -0.0, 0.0, 0.0], [-1.0, float("nan"), float("inf"), 3.0], [-float("inf")] * 4], device=device
    )
    values, indices = choose(x, 3)
    assert indices.tolist() == [[0, 1, 2], [1, 2, 3], [0, 1, 2]]
    assert values[1, 0].isnan()
    assert values[2].tolist() == [-float("inf")] * 3


@pytest.mark.parametrize("device", EVERYWHERE)
def test_it_has_the_shapes_of_its_fake(device):
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_optim.choose, (torch.randn(3, 20, device=device), 4), test_utils=utils)


def test_what_it_takes():
    assert takes(torch.randn(1, 128), 8)
    assert not takes(torch.randn(1, 50000), 50)
    assert not takes(torch.randn(300, 128), 8)
    assert not takes(torch.randn(1, 2, 128), 8)
    assert not takes(torch.randn(1, 128).double(), 8)
