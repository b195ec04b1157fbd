"""Exchanges of small tensors through mapped memory: gathers by a sum, which tensors take it, and a real call."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from hf_optim.toolkit.distributed import collectives, peer_memory, tensor_parts


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_sum_of_parts_among_zeros_is_their_gather(ranks, dtype):
    parts = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(rank)).to(dtype) for rank in range(ranks)]
    parts[0][0, 0, :2] = torch.tensor([float("inf"), 1e-40])
    total = sum(tensor_parts.beside_zeros(part, rank, ranks) for rank, part in enumerate(parts))
    assert torch.equal(total, torch.cat(parts, dim=-1))


class Peers:
    """Two ranks that have the same tensor."""

    def __init__(self):
        self.shapes = []

    def sum(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor * 2


@pytest.fixture
def peers(monkeypatch):
    found = Peers()
    monkeypatch.setattr(tensor_parts, "peer_memory", lambda device: found)
    monkeypatch.setattr(tensor_parts, "fits", lambda tensor: tensor.nbytes <= 256)
    monkeypatch.setattr(tensor_parts, "LIMIT", 256)
    monkeypatch.setattr(collectives, "world_size", lambda: 2)
    monkeypatch.setattr(collectives, "rank", lambda: 1)
    return found


def test_small_tensors_take_it_and_large_ones_the_process_group(peers, monkeypatch):
    reduced, gathered = [], []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tuple(tensor.shape)))
    monkeypatch.setattr(tensor_parts, "gather_into", lambda out, tensor: gathered.append(tensor.numel()))
    small, large = torch.ones(1, 1, 16), torch.ones(4, 1, 32)
    assert torch.equal(tensor_parts.sum_over_ranks(small), torch.full_like(small, 2.0))
    assert torch.equal(tensor_parts.gather_over_ranks(small)[..., 16:], torch.full_like(small, 2.0))
    tensor_parts.sum_over_ranks(large)
    tensor_parts.gather_over_ranks(large)
    assert peers.shapes == [(1, 1, 16), (1, 1, 32)]
    assert (reduced, gathered) == ([(4, 1, 32)], [128])


def test_tensors_with_gradients_take_the_process_group(peers, monkeypatch):
    reduced = []
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: reduced.append(tuple(tensor.shape)))
    tensor_parts.sum_over_ranks(torch.ones(1, 16, requires_grad=True))
    assert (peers.shapes, reduced) == ([], [(1, 16)])


def test_none_on_a_cpu():
    assert peer_memory.peer_memory(torch.device("cpu")) is None
    assert not peer_memory.fits(torch.ones(16))


@pytest.mark.gpu
def test_one_rank_maps_its_own_memory(tmp_path):
    device = torch.device("cuda", torch.cuda.current_device())
    dist.init_process_group("nccl", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1, device_id=device)
    try:
        from torch.distributed import _symmetric_memory as symmetric

        buffer = symmetric.empty(peer_memory.LIMIT, dtype=torch.uint8, device=device)
        symmetric.rendezvous(buffer, dist.group.WORLD.group_name)
        held = peer_memory.PeerMemory(buffer, dist.group.WORLD.group_name)
        for dtype in peer_memory.DTYPES:
            x = torch.randn(3, 64, device=device).to(dtype)
            assert peer_memory.fits(x)
            assert torch.equal(held.sum(x), x)
            assert torch.equal(held.sum(x[1:]), x[1:])  # not at the beginning of its memory
        assert not peer_memory.fits(torch.ones(8, device=device, dtype=torch.float16))
        assert peer_memory.peer_memory(device) is None  # one rank has no others
    finally:
        dist.destroy_process_group()
