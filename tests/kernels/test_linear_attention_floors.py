"""hf_optim::linear_attention of kind trig, with a floor that grows with the tokens and columns of W that learn."""

from __future__ import annotations

import math

import pytest
import torch
from interpreting import EVERYWHERE, relative
from torch.nn import functional

from hf_optim_kernels.linear_attention import op
from hf_optim_kernels.linear_attention.op import Settings, State

H, G, N, D, M = 4, 2, 40, 16, 16
SETTINGS = Settings("trig", 1.0, floor=0.3, eps=1e-3)
LEAVES = ("query", "key", "value", "gate", "amounts", "columns")


def drawn(dtype=torch.float64, device="cpu", causal=True):
    random = torch.Generator().manual_seed(0)

    def draw(*size):
        return torch.randn(*size, generator=random, dtype=torch.float64)

    found = {"query": draw(1, H, N, D), "key": draw(1, G, N, D), "value": draw(1, G, N, D), "weight": draw(G, M, D)}
    found["gate"] = functional.logsigmoid(draw(1, G, N) + 2)
    found["amounts"], found["columns"] = draw(1, G, N).abs() + 0.1, draw(G, D).abs() + 0.5
    if not causal:
        found.pop("gate")
        found["amounts"] *= 40  # denominators are sums over all tokens
    return {name: each.to(device, dtype) for name, each in found.items()}


def oracle(query, key, value, weight, amounts, columns, gate=None, causal=True):
    """All pairs in float64."""
    rows = weight * columns[:, None]

    def phi(x):
        angles = x / (x.norm(dim=-1, keepdim=True) + 1e-3) @ rows.repeat_interleave(x.shape[1] // G, 0).mT
        return torch.cat([angles.sin(), angles.cos()], -1) / math.sqrt(M)

    pairs = phi(query) @ phi(key).repeat_interleave(2, 1).mT
    if gate is not None:
        level = gate.cumsum(-1)
        decay = (level[..., None] - level[:, :, None] + torch.log(-torch.expm1(gate))[:, :, None]).tril()
        pairs = pairs * decay.exp().repeat_interleave(2, 1)
    pairs = pairs.tril() if causal else pairs
    below = torch.maximum(pairs.sum(-1), 0.3 * amounts.repeat_interleave(2, 1))
    return pairs / below[..., None] @ value.repeat_interleave(2, 1), pairs.sum(-1)


def call(query, key, value, weight, amounts, columns, gate=None, causal=True, **more):
    settings = SETTINGS._replace(causal=causal)
    return op.linear_attention(
        query, key, value, weight, settings, None, gate, amounts=amounts, columns=columns, **more
    )  # fmt: skip


@pytest.mark.parametrize("device", EVERYWHERE)
@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_gradients_are_those_of_all_pairs(causal, device):
    dtype = torch.float64 if device == "cpu" and not op.can_run_triton(torch.zeros(1)) else torch.float32
    given, right = drawn(dtype, device, causal), drawn(causal=causal)
    leaves = [name for name in LEAVES if name in given]
    for each in (given, right):
        for name in leaves:
            each[name].requires_grad_()
    (out, _), (goal, bottom) = call(**given, causal=causal), oracle(**right, causal=causal)
    floors = 0.3 * right["amounts"].repeat_interleave(2, 1)
    assert 0.1 < (bottom < floors).double().mean() < 0.9
    slope = torch.randn(goal.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found = torch.autograd.grad(out, [given[name] for name in leaves], slope.to(out))
    wanted = torch.autograd.grad(goal, [right[name] for name in leaves], slope)
    bound = 1e-10 if dtype == torch.float64 else 4e-6
    assert relative(out.cpu(), goal) < bound
    for name, one, other in zip(leaves, found, wanted, strict=True):
        assert relative(one.cpu(), other) < 10 * bound, name


@pytest.mark.parametrize("device", EVERYWHERE)
def test_steps_have_floors_of_their_own(device):
    given = drawn(torch.float32, device)
    weight, columns = given["weight"], given["columns"]
    with torch.no_grad():
        goal, _ = call(**given)
        before = {name: each[:, :, : N - 2] for name, each in given.items() if name not in ("weight", "columns")}
        _, state = call(**before, weight=weight, columns=columns, return_state=True)
        rows, state = weight * columns[:, None], State(*(each.contiguous() for each in state))
        for t in (N - 2, N - 1):
            q, k, v, gate, amounts = (given[name][:, :, t : t + 1].contiguous() for name in LEAVES[:5])
            found = op.step(q, k, v, rows, SETTINGS, state, gate, amounts)
            assert relative(found.cpu(), goal[:, :, t : t + 1].cpu()) < 1e-5


def test_a_column_of_zeros_has_no_gradient_and_others_do():
    given = drawn()
    given["columns"][0, 3] = 0
    given["columns"].requires_grad_()
    call(**given)[0].sum().backward()
    assert given["columns"].grad[0, 3] == 0
    assert given["columns"].grad[0, 4] != 0


def test_what_is_refused():
    given = drawn()
    for match, change in (
        (r"amounts of \[1, 2, 39\]", {"amounts": given["amounts"][..., 1:]}),
        (r"columns of \[2, 15\]", {"columns": given["columns"][:, 1:]}),
    ):
        with pytest.raises(ValueError, match=match):
            call(**{**given, **change})
    three = [given[name] for name in LEAVES[:3]]
    with pytest.raises(ValueError, match="amounts or columns with features of kind positive"):
        op.linear_attention(*three, given["weight"], Settings("positive", 1.0), amounts=given["amounts"])
