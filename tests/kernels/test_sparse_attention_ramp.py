"""hf_optim::sparse_attention with a ramp by distance: outputs and gradients against autograd in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from block_layouts import layout_of, to
from interpreting import BOUND, CUDA, EVERYWHERE, on_triton, relative
from torch.utils.flop_counter import FlopCounterMode

from hf_optim_kernels.sparse_attention import op

SCALE = 0.4


class Case(NamedTuple):
    """Sizes of a call; the reach, the slope and the limit of each head."""

    seen: torch.Tensor
    heads: list[int]
    G: int
    N: int
    ramp: list[tuple[float, float, float]]
    segments: torch.Tensor | None = None
    B: int = 1
    D: int = 16


def band(n, behind, ahead=0):
    distance = torch.arange(n) - torch.arange(n)[:, None]
    return (distance >= -behind) & (distance <= ahead)


def by_head(n):
    return torch.stack([band(n, 40), band(n, n), band(n, 10)])


PACKED = torch.tensor([[0] * 30 + [1] * 55 + [-1] * 5, [-1] * 7 + [0] * 83])
CASES = {
    "causal": Case(band(100, 60)[None], [0, 0], 2, 100, [(33.5, 1 / 16, 100.0), (58.0, 1 / 8, 100.0)]),
    "by-head": Case(
        by_head(90), [0, 1, 2, 1], 2, 90,
        [(30.0, 0.1, 90.0), (200.5, 1 / 32, 90.0), (8.2, 1 / 4, 90.0), (70.1, 0.05, 50.0)],
    ),
    "both-sides": Case(band(100, 50, 50)[None], [0], 1, 100, [(40.0, 1 / 32, 100.0)], D=32),
    "steep": Case(band(70, 70)[None], [0, 0], 1, 70, [(0.5, 1 / 2, 70.0), (1.0, 1.0, 70.0)]),
    "documents": Case(band(90, 60)[None], [0, 0], 1, 90, [(20.0, 0.1, 90.0), (60.0, 1 / 16, 90.0)], PACKED, 2),
}  # fmt: skip


def inputs_of(case, dtype, device):
    random = torch.Generator().manual_seed(3)
    sizes = [(case.B, heads, case.N, case.D) for heads in (len(case.heads), case.G, case.G)]
    drawn = [torch.randn(size, generator=random, dtype=torch.float64).to(device, dtype) for size in sizes]
    reach = torch.tensor([each[0] for each in case.ramp], dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return [each.requires_grad_() for each in (*drawn, reach.to(device, wide))]


def ramp_of(case, reach):
    rest = torch.tensor([each[1:] for each in case.ramp], dtype=reach.dtype, device=reach.device)
    return torch.cat([reach[:, None], rest], 1)


def by_formula(case, query, key, value, reach):
    """The formula on whole matrices."""
    group = len(case.heads) // case.G
    away = (torch.arange(case.N)[:, None] - torch.arange(case.N)).abs()
    seen = case.seen[torch.tensor(case.heads)][None]
    if case.segments is not None:
        own = case.segments
        seen = seen & ((own[:, :, None] == own[:, None, :]) & (own >= 0)[:, :, None])[:, None]
    counts = []
    for head, (_, slope, limit) in enumerate(case.ramp):
        count = ((reach[head] - away) * slope).clamp(0, 1)
        counts.append(torch.where(away < limit, count, 0.0))
    seen = seen & (torch.stack(counts) > 0)
    scores = (query @ key.repeat_interleave(group, 1).mT * SCALE).masked_fill(~seen, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach()
    largest = largest.masked_fill(largest.isinf(), 0.0)
    shares = torch.exp(scores - largest) * torch.stack(counts)
    total = shares.sum(-1, keepdim=True)
    some = total > 0
    out = torch.where(some, shares / torch.where(some, total, 1.0), 0.0) @ value.repeat_interleave(group, 1)
    logs = torch.where(some, total, 1.0).log() + largest
    return out, torch.where(some, logs, -torch.inf)[..., 0]


def gradients(case, inputs, out, lse):
    random = torch.Generator().manual_seed(5)
    grad_out = torch.randn(out.shape, generator=random, dtype=torch.float64).to(out.device, out.dtype)
    grad_lse = torch.randn(lse.shape, generator=random, dtype=torch.float64).to(lse.device, lse.dtype)
    loss = (out * grad_out).sum() + (lse.masked_fill(lse.isinf(), 0) * grad_lse).sum()
    return torch.autograd.grad(loss, inputs)


def both(case, dtype, device, split=1000):
    ours = inputs_of(case, dtype, device)
    exact = [each.detach().cpu().double().requires_grad_() for each in ours]
    right = by_formula(case, *exact)
    right = [*right, *gradients(case, exact, *right)]
    layout = to(layout_of(case.seen, 32, case.heads), device)
    segments = [] if case.segments is None else [case.segments.int().to(device)] * 2
    found = op.sparse_attention(*ours[:3], layout, SCALE, *(segments or (None, None)), ramp_of(case, ours[3]))
    return [*found, *gradients(case, ours, *found)], right


def compare(found, right, bound, gradient_bound):
    blind = right[1].isinf()
    assert torch.equal(found[1].isinf().cpu(), blind)
    assert relative(found[0].cpu(), right[0]) < bound
    torch.testing.assert_close(found[1].cpu().double()[~blind], right[1][~blind].detach(), rtol=bound, atol=bound)
    for name, one, other in zip(("query", "key", "value", "reach"), found[2:], right[2:], strict=True):
        assert relative(one.cpu(), other) < gradient_bound, name


@pytest.mark.parametrize("name", list(CASES))
def test_the_specification(name):
    compare(*both(CASES[name], torch.float64, "cpu"), 1e-12, 1e-11)


@on_triton
@pytest.mark.parametrize("name", list(CASES))
def test_the_kernels(name, device):
    compare(*both(CASES[name], torch.float32, device), 2e-6, 1e-5)


@pytest.mark.many
@on_triton
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, device):
    compare(*both(CASES["by-head"], dtype, device), 3 * BOUND[dtype], 4 * BOUND[dtype])


@pytest.mark.parametrize("device", EVERYWHERE)
def test_a_ramp_beyond_all_keys_changes_nothing(device):
    case = CASES["by-head"]
    query, key, value, _ = inputs_of(case, torch.float32, device)
    layout = to(layout_of(case.seen, 32, case.heads), device)
    flat = torch.tensor([[1e6, 0.5, 1e9]] * len(case.heads), device=device)
    plain = op.sparse_attention(query, key, value, layout, SCALE)
    for one, other in zip(op.sparse_attention(query, key, value, layout, SCALE, None, None, flat), plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@on_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
def test_hidden_keys_with_large_scores_are_nothing(device):
    case = CASES["causal"]
    ours = [each.detach().clone() for each in inputs_of(case, torch.float32, device)]
    ours[1][:, :, ::3] *= 300
    exact = [each.double().cpu().requires_grad_() for each in ours]
    ours = [each.requires_grad_() for each in ours]
    right = by_formula(case, *exact)
    right = [*right, *gradients(case, exact, *right)]
    layout = to(layout_of(case.seen, 32, case.heads), device)
    found = op.sparse_attention(*ours[:3], layout, SCALE, None, None, ramp_of(case, ours[3]))
    found = [*found, *gradients(case, ours, *found)]
    assert all(torch.isfinite(each).all() for each in found[2:])
    compare(found, right, 1e-4, 1e-3)


def test_the_operator_has_a_fake():
    case = CASES["documents"]
    query, key, value, reach = inputs_of(case, torch.float64, "cpu")
    layout = layout_of(case.seen, 32, case.heads)

    arguments = (
        query, key, value, None, None, layout.heads, layout.starts, layout.columns, layout.masks, layout.bits,
        layout.key_starts, layout.rows, layout.key_masks, None, None, [], [32], SCALE, ramp_of(case, reach).detach(),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.hf_optim.sparse_attention, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_ramp_of_other_heads_is_refused():
    query, key, value, _ = inputs_of(CASES["causal"], torch.float32, "cpu")
    layout = layout_of(CASES["causal"].seen, 32, [0, 0])
    with pytest.raises(ValueError, match=r"does not take a ramp of \[3, 3\]"):
        op.sparse_attention(query, key, value, layout, SCALE, None, None, torch.ones(3, 3))


@pytest.mark.parametrize("device", [CUDA])
def test_many_blocks_in_pieces(device):
    """Lists that are cut, on a GPU."""
    n = 1500
    seen = torch.stack([band(n, 1200), band(n, 70)])
    case = Case(seen, [0, 1, 0, 1], 2, n, [(1100.0, 1 / 256, 1500.0), (60.0, 1 / 32, 1500.0)] * 2, D=64)
    compare(*both(case, torch.bfloat16, device), 3 * BOUND[torch.bfloat16], 4 * BOUND[torch.bfloat16])


@on_triton
@pytest.mark.parametrize("name", ["by-head", "documents"])
def test_a_call_past_torch_library_gives_the_same_bits(name, device, monkeypatch):
    case, watched = CASES[name], []
    operator, _ = both(case, torch.float32, device)
    monkeypatch.setattr(op, "DIRECT", True)
    real = op._operator
    monkeypatch.setattr(op, "_operator", lambda *given: watched.append(1) or real(*given))
    direct, _ = both(case, torch.float32, device)
    assert not watched
    for one, other in zip(direct, operator, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    query, key, value, reach = inputs_of(case, torch.float32, device)
    layout = to(layout_of(case.seen, 32, case.heads), device)
    given = query, key.detach(), value, layout, SCALE, None, None, ramp_of(case, reach)
    out, lse = op.sparse_attention(*given)  # one of two outputs, and an input without a gradient
    found = torch.autograd.grad(out.sum(), (query, value, reach))
    again = torch.autograd.grad(op.sparse_attention(*given)[1].sum(), (query, reach))
    monkeypatch.setattr(op, "DIRECT", False)
    expected = torch.autograd.grad(op.sparse_attention(*given)[0].sum(), (query, value, reach))
    logs = torch.autograd.grad(op.sparse_attention(*given)[1].sum(), (query, reach))
    for one, other in zip((*found, *again), (*expected, *logs), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    monkeypatch.setattr(op, "DIRECT", True)
    with FlopCounterMode(display=False):  # what watches operators sees the operator
        op.sparse_attention(*given)
    assert len(watched) == 3
    assert lse.shape == query.shape[:3]
