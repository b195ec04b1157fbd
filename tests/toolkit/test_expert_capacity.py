"""Capacities and slots of experts, against the published rules and a count token by token."""

from __future__ import annotations

import math

import pytest
import torch

from hf_optim.toolkit.experts import ROUNDINGS, capacity, slot_positions
from hf_optim.toolkit.experts.capacity import is_dropless
from hf_optim.toolkit.experts.plan import ranks_among_equals, renormalized

# C k T / E in floating point, as the published codes compute it.
PUBLISHED = {
    "round": lambda c, k, t, e: round(c * k * t / e),
    "vmoe": lambda c, k, t, e: math.ceil(math.ceil(c * t * k / e) / 4) * 4,
    "tutel": lambda c, k, t, e: k * int(c * math.ceil(t / e)),
    "floor": lambda c, k, t, e: int(c * k * t / e),
    "ceil": lambda c, k, t, e: math.ceil(c * k * t / e),
    "nllb": lambda c, k, t, e: math.ceil(c * t),
}


def slots(rounding, c, k, t, e):
    return int(capacity(rounding, c, torch.tensor(t), k, e))


def test_the_six_rules_on_seven_tokens():
    assert set(PUBLISHED) == set(ROUNDINGS)
    assert [slots(rule, 1.0, 2, 7, 8) for rule in PUBLISHED] == [2, 4, 2, 1, 2, 7]


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_the_rules_are_the_published_ones(rounding):
    for c in (0.25, 0.5, 0.75, 1.0, 1.25, 1.5):  # exact in binary, so that their code rounds as written
        for k, e in ((1, 4), (2, 8), (4, 32)):
            if is_dropless(rounding, c, k, e):
                continue
            tokens = torch.arange(1, 200)
            expected = [PUBLISHED[rounding](c, k, t, e) for t in tokens.tolist()]
            assert capacity(rounding, c, tokens, k, e).tolist() == expected


def test_a_capacity_is_not_rounded_by_the_noise_of_floating_point():
    assert 0.1 * 3 * 10 > 3
    assert slots("ceil", 0.1, 3, 80, 8) == 3
    assert slots("floor", 0.7, 1, 10, 1 * 7) == 1
    assert slots("floor", 8 / 3, 3, 9, 8) == 9


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("k", "e"), [(1, 3), (2, 8), (3, 8), (6, 64)])
def test_from_e_over_k_on_nothing_is_dropped(rounding, k, e):
    assert is_dropless(rounding, e / k, k, e)
    tokens = torch.arange(1, 50)
    assert bool((capacity(rounding, e / k, tokens, k, e) >= tokens).all())
    just_below = e / k * 0.999 if rounding != "nllb" else 0.999
    assert not is_dropless(rounding, just_below, k, e)


def test_ranks_among_equals():
    assert ranks_among_equals(torch.tensor([3, 1, 3, 3, 0, 1])).tolist() == [0, 0, 1, 2, 0, 1]


def random_choices(tokens=40, experts=6, top_k=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = torch.rand(tokens, experts, generator=generator).softmax(-1)
    weights, chosen = gates.topk(top_k)
    return chosen, weights, torch.rand(tokens, generator=generator) < 0.8


def slots_one_by_one(chosen, counted, order, groups):
    used, found = {}, torch.full(chosen.shape, -1)
    for choice in range(chosen.shape[1]):
        for token in order:
            if counted[token, choice]:
                key = int(groups[token]), int(chosen[token, choice])
                found[token, choice] = used.get(key, 0)
                used[key] = used.get(key, 0) + 1
    return found


@pytest.mark.parametrize("grouped", [False, True])
def test_first_choices_come_before_second_ones_and_padding_takes_no_slot(grouped):
    chosen, _, real = random_choices()
    groups = torch.arange(40) // 10 if grouped else torch.zeros(40, dtype=torch.int64)
    counted = real[:, None].expand_as(chosen)
    expected = slots_one_by_one(chosen, counted, range(40), groups)
    assert torch.equal(slot_positions(chosen, counted, 6, groups=groups if grouped else None), expected)
    assert (expected[~real] == -1).all()


def test_by_priority_the_best_tokens_are_kept_wherever_they_stand():
    chosen, weights, real = random_choices(seed=1)
    counted, priority = real[:, None].expand_as(chosen), weights.amax(1)
    order = sorted(range(40), key=lambda t: -float(priority[t]))
    expected = slots_one_by_one(chosen, counted, order, torch.zeros(40))
    found = slot_positions(chosen, counted, 6, priority=priority)
    assert torch.equal(found, expected)
    moved = torch.randperm(40, generator=torch.Generator().manual_seed(2))
    assert torch.equal(slot_positions(chosen[moved], counted[moved], 6, priority=priority[moved]), found[moved])
    for expert in range(6):
        firsts = (chosen[:, 0] == expert) & real
        best = priority[firsts].sort(descending=True).values
        assert torch.equal(priority[firsts & (found[:, 0] < 2)].sort(descending=True).values, best[:2])


def test_equal_priorities_keep_the_order_of_positions():
    chosen = torch.zeros(6, 1, dtype=torch.int64)
    counted = torch.ones(6, 1, dtype=torch.bool)
    priority = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0, 2.0])
    assert slot_positions(chosen, counted, 1, priority=priority)[:, 0].tolist() == [3, 0, 4, 1, 5, 2]


def test_choices_are_ordered_by_gate_not_by_column():
    chosen, weights, _ = random_choices(seed=3)
    counted = torch.ones_like(chosen, dtype=torch.bool)
    flipped = slot_positions(chosen.flip(1), counted, 6, choices=weights.flip(1))
    assert torch.equal(flipped.flip(1), slot_positions(chosen, counted, 6, choices=weights))


def test_renormalized_gates_keep_their_sum_and_a_token_without_expert_has_a_finite_gradient():
    weights = torch.tensor([[0.5, 0.3], [0.6, 0.1], [0.4, 0.2]], requires_grad=True)
    kept = torch.tensor([[True, True], [False, True], [False, False]])
    left = renormalized(weights, kept)
    assert torch.equal(left[0], weights[0])
    assert torch.allclose(left.sum(1), torch.tensor([0.8, 0.7, 0.0]))
    left.square().sum().backward()
    assert bool(weights.grad.isfinite().all())
