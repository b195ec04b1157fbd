"""Masks over many tensors in one launch, against the specification, bit by bit."""

from __future__ import annotations

import pytest
import torch
from interpreting import on_triton

from hf_optim_kernels.masked_step import naive

# One element, less than a chunk, exactly one, one more, several, and nothing at all.
SHAPES = [(1,), (7, 3), (64, 64), (4097,), (129, 130), (0, 5)]
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def random_case(dtype, device, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(shape, generator=g).to(dtype) for shape in SHAPES]
    for tensor in tensors[1:-1]:
        flat = tensor.view(-1)
        flat[0], flat[1], flat[2], flat[3] = float("nan"), float("inf"), -0.0, -1.0
    masks = [torch.rand(shape, generator=g) < 0.5 for shape in SHAPES]
    return [t.to(device) for t in tensors], [m.to(device) for m in masks]


def bits(tensor):
    return tensor.view(INTEGERS[tensor.element_size()])


def test_the_specification_zeroes_what_is_not_finite_and_leaves_no_sign():
    tensor = torch.tensor([float("nan"), float("inf"), -1.0, float("nan"), -2.0])
    naive.zero_([tensor, None], [torch.tensor([False, False, False, True, True]), torch.zeros(1, dtype=torch.bool)])
    assert bits(tensor)[:3].tolist() == [0, 0, 0]
    assert tensor[3].isnan()
    assert tensor[4] == -2.0


@on_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_the_kernel_equals_the_specification(device, dtype):
    from hf_optim_kernels.masked_step.launch import Zeroing

    tensors, masks = random_case(dtype, device)
    expected = [t.clone() for t in tensors]
    naive.zero_(expected, masks)
    zeroing = Zeroing(masks)
    zeroing(tensors)
    for found, wanted in zip(tensors, expected, strict=True):
        assert torch.equal(bits(found), bits(wanted))


@on_triton
def test_tensors_that_move_come_and_go(device):
    from hf_optim_kernels.masked_step.launch import Zeroing

    _, masks = random_case(torch.float32, device)
    zeroing = Zeroing(masks)
    kept_alive = []
    for turn in range(3):
        tensors, _ = random_case(torch.float32, device, seed=turn + 1)
        tensors[turn] = None
        kept_alive.append(tensors)  # so that the next ones stand elsewhere
        expected = [None if t is None else t.clone() for t in tensors]
        naive.zero_(expected, masks)
        zeroing(tensors)
        for found, wanted in zip(tensors, expected, strict=True):
            assert (found is None and wanted is None) or torch.equal(bits(found), bits(wanted))
    zeroing([None] * len(masks))


@on_triton
def test_the_table_is_copied_only_when_a_tensor_moved(device):
    from hf_optim_kernels.masked_step.launch import Zeroing

    tensors, masks = random_case(torch.float32, device)
    zeroing = Zeroing(masks)
    zeroing(tensors)
    table = zeroing._addresses
    tensors[2].fill_(1.0)
    masks[2].zero_()
    zeroing(tensors)
    assert zeroing._addresses is table
    assert not tensors[2].any()
    zeroing([None, *tensors[1:]])
    assert zeroing._addresses is not table


@on_triton
def test_views_that_begin_anywhere(device):
    from hf_optim_kernels.masked_step.launch import Zeroing

    buffer = torch.ones(9001, dtype=torch.bfloat16, device=device)
    parts = [buffer[1:4501], buffer[4503:8999]]
    masks = [torch.rand(p.shape, device=device) < 0.5 for p in parts]
    Zeroing(masks)(parts)
    for part, mask in zip(parts, masks, strict=True):
        assert torch.equal(part != 0, mask)
    assert bool(buffer[[0, 4501, 4502, 8999, 9000]].all())  # nothing beyond the ends


@on_triton
def test_what_does_not_fit_is_refused_and_nothing_is_written(device):
    from hf_optim_kernels.masked_step.launch import Zeroing

    masks = [torch.zeros(4, 6, dtype=torch.bool, device=device)] * 2
    zeroing, fine = Zeroing(masks), torch.ones(4, 6, device=device)
    for other, message in [
        (torch.ones(6, 4, device=device).T, "not contiguous"),
        (torch.ones(4, 6, device=device).bfloat16(), "cannot share a table"),
        (torch.ones(6, 4, device=device), "does not fit a tensor of"),
    ]:
        with pytest.raises(ValueError, match=message):
            zeroing([fine, other])
    assert bool(fine.all())
    with pytest.raises(ValueError, match="bool"):
        Zeroing([torch.ones(3, device=device)])
