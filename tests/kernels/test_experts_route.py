"""hf_optim::experts_route: the specification counted pair by pair, and the kernels against it."""

from __future__ import annotations

import pytest
import torch
from interpreting import EVERYWHERE, on_triton

pytest.importorskip("triton")

from hf_optim_kernels.experts import naive, op

CHOICES = {  # tokens, choices of each, experts, block
    "decode": (1, 8, 128, 16),
    "few": (5, 2, 7, 4),
    "one-expert": (9, 1, 1, 4),
    "several-chunks": (300, 3, 40, 16),
    "many-experts": (20, 4, 300, 16),
    "none": (0, 2, 5, 16),
}


def chosen(case, skew="spread"):
    tokens, top_k, count, _ = CHOICES[case]
    random = torch.Generator().manual_seed(tokens)
    experts = torch.randint(0, count, (tokens, top_k), generator=random)
    if skew == "one":
        experts.fill_(count - 1)
    if skew == "dropped":
        experts[torch.rand(experts.shape, generator=random) < 0.4] = count
        experts[torch.rand(experts.shape, generator=random) < 0.1] = count + 37
    if skew == "nobody":
        experts.fill_(count)
    return experts


@pytest.mark.parametrize("skew", ["spread", "one", "dropped", "nobody"])
@pytest.mark.parametrize("case", CHOICES)
def test_a_route_has_every_pair_of_every_expert_once(case, skew):
    (_, _, count, block), experts = CHOICES[case], chosen(case, skew)
    order, offsets, blocks = naive.route(experts, count, block)
    flat = experts.reshape(-1).tolist()
    expected = [[i for i, e in enumerate(flat) if e == expert] for expert in range(count)]
    assert order.tolist() == [i for each in expected for i in each] + [i for i, e in enumerate(flat) if e >= count]
    assert offsets.tolist() == [sum(map(len, expected[:e])) for e in range(count + 1)]
    wanted = [
        [e, int(offsets[e]) + first] for e in range(count) for first in range(0, len(expected[e]), block)
    ]  # fmt: skip
    assert blocks[: len(wanted)].tolist() == wanted
    assert bool((blocks[len(wanted) :, 0] == naive.NOBODY).all())


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("skew", ["spread", "one", "dropped", "nobody"])
@pytest.mark.parametrize("case", CHOICES)
def test_kernels_find_the_same_route(case, skew, device):
    (_, _, count, block), experts = CHOICES[case], chosen(case, skew)
    expected = naive.route(experts, count, block)
    for given in (experts, experts.to(torch.int32), experts.t().contiguous().t()):
        for own, right in zip(op.find_route(given.to(device), count, block), expected, strict=True):
            assert own.dtype == torch.int32
            assert torch.equal(own.cpu(), right)


@pytest.mark.parametrize("device", EVERYWHERE)
def test_the_operator_has_the_shapes_of_its_fake(device):
    experts = chosen("few").to(device)
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.hf_optim.experts_route, (experts, 7, 4), test_utils=utils)


@pytest.mark.gpu
def test_a_captured_route_follows_other_choices():
    tokens, top_k, count, block = CHOICES["several-chunks"]
    experts = chosen("several-chunks").cuda()
    op.find_route(experts, count, block)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route = op.find_route(experts, count, block)
    other = torch.randint(0, count + 1, (tokens, top_k))
    experts.copy_(other)
    graph.replay()
    for own, right in zip(route, naive.route(other, count, block), strict=True):
        assert torch.equal(own.cpu(), right)
