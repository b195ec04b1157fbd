"""Sinkhorn normalization, the networks that score blocks, and what padding does to sorted blocks."""

from __future__ import annotations

import copy

import pytest
import torch

from hf_optim_plugins.attention._sinkhorn_attention import sorted_with_padding, summaries
from hf_optim_plugins.attention._sinkhorn_sorting import (
    AttentionSorter,
    LinearSorter,
    Sorter,
    gumbel,
    of_past,
    sinkhorn,
)


def scores(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_weights_are_those_of_the_formula():
    given = scores(5, 5)
    expected = given.exp()
    for _ in range(4):
        expected = expected / expected.sum(1, keepdim=True)
        expected = expected / expected.sum(0, keepdim=True)
    torch.testing.assert_close(sinkhorn(given, 4), expected, rtol=0, atol=1e-12)
    leaf = given.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: sinkhorn(x, 3), leaf)


@pytest.mark.parametrize("scale", [1.0, 1 / 0.75, 10.0])
def test_columns_sum_to_one(scale):
    for iterations in (1, 8):
        found = sinkhorn(scores(2, 16, 16, scale=scale).float(), iterations)
        torch.testing.assert_close(found.sum(-2), torch.ones(2, 16), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 1e-3), (1 / 0.75, 1e-3), (4.0, 0.2)])
def test_rows_sum_to_one_within_a_bound_that_iterations_lower(scale, bound):
    given = scores(8, 16, 16, seed=1, scale=scale)
    errors = [float((sinkhorn(given, n).sum(-1) - 1).abs().max()) for n in (1, 8, 64)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[1] < bound
    assert errors[0] > 1e-2  # one iteration is not enough: the test can fail


def test_a_small_temperature_sorts_by_a_permutation():
    best = torch.tensor([2, 0, 3, 1])
    given = scores(4, 4, scale=0.1)
    given[torch.arange(4), best] += 1.0
    torch.testing.assert_close(sinkhorn(given / 0.05, 32), torch.eye(4).double()[best], rtol=0, atol=1e-3)


def test_blocks_of_padding_take_no_part():
    given = scores(6, 6)
    valid = torch.tensor([True, True, False, True, False, False])
    found = sinkhorn(given, 5, valid)
    kept = valid.nonzero()[:, 0]
    torch.testing.assert_close(found[kept][:, kept], sinkhorn(given[kept][:, kept], 5), rtol=0, atol=1e-12)
    assert float(found.sum()) == pytest.approx(3.0)
    assert not found[~valid].any()
    assert not found[:, ~valid].any()
    assert not sinkhorn(given, 5, torch.zeros(6, dtype=torch.bool)).any()


def test_a_causal_row_is_a_softmax_over_earlier_blocks():
    given = scores(5, 5)
    found = of_past(given)
    for i in range(5):
        expected = torch.zeros(5, dtype=torch.float64)
        if i:
            expected[:i] = given[i, :i].softmax(0)
        torch.testing.assert_close(found[i], expected, rtol=0, atol=1e-12)


def test_noise_is_gumbel_noise_of_a_seed():
    found = gumbel((40000,), 3)
    assert torch.equal(found, gumbel((40000,), 3))
    assert not torch.equal(found, gumbel((40000,), 4))
    assert float(found.mean()) == pytest.approx(0.5772, abs=0.03)
    assert float(found.var()) == pytest.approx(torch.pi**2 / 6, abs=0.06)


def test_the_networks_are_those_of_the_formulas():
    asked, own, held = (scores(2, 3, 4, 6, seed=seed) for seed in (1, 2, 3))
    attention, linear = AttentionSorter(3, 6).double(), LinearSorter(3, 6, 5, 0).double()
    expected = asked @ held.transpose(2, 3) / 6**0.5
    torch.testing.assert_close(attention(asked, own, held), expected)  # it begins as the product
    with torch.no_grad():
        for number, weight in enumerate([*attention.parameters(), *linear.parameters()]):
            weight.copy_(scores(*weight.shape, seed=10 + number))
    for g in range(3):
        expected = (asked[:, g] @ attention.query[g]) @ (held[:, g] @ attention.key[g]).transpose(1, 2) / 6**0.5
        torch.testing.assert_close(attention(asked, own, held)[:, g], expected)
        inner = torch.cat([asked, own], -1)[:, g] @ linear.inner[g] + linear.inner_bias[g, 0]
        expected = (inner.clamp_min(0) @ linear.outer[g] + linear.outer_bias[g, 0])[..., :4]
        torch.testing.assert_close(linear(asked, own, held)[:, g], expected)
    with pytest.raises(ValueError, match="for 5 blocks, and got a row of 6"):
        linear(asked, own, torch.zeros(2, 3, 6, 6, dtype=torch.float64))


def a_sorter(positive="exp", noise=1.0):
    return Sorter(AttentionSorter(1, 4), positive, 0.5, 4, noise, 7)


def test_scores_are_divided_by_the_temperature_and_made_positive():
    asked, held = scores(1, 1, 3, 4, seed=1), scores(1, 1, 3, 4, seed=2)
    plain = asked @ held.transpose(2, 3) / 2
    torch.testing.assert_close(a_sorter().eval().scores(asked, asked, held), plain / 0.5)
    expected = (plain.clamp_min(0) + 1e-6).log() / 0.5
    torch.testing.assert_close(a_sorter("relu").eval().scores(asked, asked, held), expected)


def test_noise_is_drawn_in_training_and_continues_from_a_checkpoint():
    asked, held = scores(1, 1, 3, 4, seed=1), scores(1, 1, 3, 4, seed=2)
    sorter = a_sorter().train()
    first, second = (sorter.scores(asked, asked, held) for _ in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(a_sorter().train().scores(asked, asked, held), first)
    state = sorter.state_dict()
    assert int(state["draws"]) == 2
    other = a_sorter().train()
    other.load_state_dict(state)
    assert torch.equal(other.scores(asked, asked, held), copy.deepcopy(sorter).scores(asked, asked, held))
    quiet = sorter.eval().scores(asked, asked, held)
    assert torch.equal(quiet, sorter.scores(asked, asked, held))
    assert torch.equal(a_sorter(noise=0.0).train().scores(asked, asked, held), quiet)


def test_a_sorted_place_counts_with_its_share_of_tokens():
    weights = sinkhorn(scores(1, 1, 3, 3), 20)
    key, value = scores(1, 1, 3, 4, 2, seed=1), scores(1, 1, 3, 4, 2, seed=2)
    valid = torch.ones(1, 3, 4, dtype=torch.bool)
    valid[0, 2, 2:] = False
    found = sorted_with_padding(weights, (key, value), valid)
    for i in range(3):
        for place in range(4):
            blocks = [j for j in range(3) if valid[0, j, place]]
            own = weights[0, 0, i, blocks]
            share = own.sum() / weights[0, 0, i].sum()
            for made, part in zip(found, (key, value), strict=False):
                expected = (own[:, None] * part[0, 0, blocks, place]).sum(0) / share
                torch.testing.assert_close(made[0, 0, i, place], expected)
            torch.testing.assert_close(found[2][0, 0, i, place], share.log())
    nothing = sorted_with_padding(weights, (key, value), valid & (torch.arange(4) < 3))[2]
    assert bool((nothing[..., 3] == -torch.inf).all())


def test_summaries_leave_padding_out():
    blocks, valid = scores(2, 1, 3, 4, 5), torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0)) < 0.6
    valid[0, 1] = False
    for kind in ("sum", "mean"):
        found = summaries(blocks, kind, valid)
        for r in range(2):
            for n in range(3):
                kept = blocks[r, 0, n, valid[r, n]]
                expected = kept.sum(0) / (max(1, len(kept)) if kind == "mean" else 1)
                torch.testing.assert_close(found[r, 0, n], expected)
        torch.testing.assert_close(summaries(blocks, kind, None), getattr(blocks, kind)(3))
