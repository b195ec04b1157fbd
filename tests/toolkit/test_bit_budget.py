"""Bit allocation against brute force, and against the bytes that compressed-tensors writes."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from hf_optim.toolkit.quantization import bit_budget
from hf_optim.toolkit.quantization.bit_budget import allocate_bits, allocate_bits_by_rank, row_bytes, stored_bytes

CHOICES = (2, 4, 8)


def problem(seed: int, layers: int = 6):
    draw = random.Random(seed)
    names = [f"layer{i}" for i in range(layers)]
    costs = {name: {bits: draw.random() * 4.0**-bits * 100 for bits in CHOICES} for name in names}
    weights = {name: draw.choice([96, 128, 352, 1000]) for name in names}
    sizes = {name: {bits: weights[name] * bits + draw.randrange(5) for bits in CHOICES} for name in names}
    least, most = (sum(pick(own.values()) for own in sizes.values()) for pick in (min, max))
    return costs, sizes, draw.randrange(least, most)


@pytest.mark.parametrize("seed", range(12))
def test_the_allocation_equals_enumeration(seed):
    costs, sizes, limit = problem(seed)
    best = min(
        sum(costs[name][b] for name, b in zip(costs, plan, strict=True))
        for plan in itertools.product(CHOICES, repeat=len(costs))
        if sum(sizes[name][b] for name, b in zip(costs, plan, strict=True)) <= limit
    )
    plan = allocate_bits(costs, sizes, limit)
    assert list(plan) == list(costs)
    assert sum(sizes[name][bits] for name, bits in plan.items()) <= limit
    assert sum(costs[name][bits] for name, bits in plan.items()) == pytest.approx(best, rel=1e-12)


def test_many_layers_within_the_budget_when_pairs_are_merged(monkeypatch):
    costs, sizes, _ = problem(3, layers=40)
    limit = sum(own[4] for own in sizes.values())
    exact = allocate_bits(costs, sizes, limit)
    monkeypatch.setattr(bit_budget, "MAX_PAIRS", 500)
    merged = allocate_bits(costs, sizes, limit)
    total = {
        name: sum(costs[layer][bits] for layer, bits in plan.items())
        for name, plan in {"exact": exact, "merged": merged, "uniform": dict.fromkeys(costs, 4)}.items()
    }
    assert sum(sizes[name][bits] for name, bits in merged.items()) <= limit
    assert total["exact"] <= total["merged"] <= 1.02 * total["exact"]
    assert total["exact"] < total["uniform"]


def test_equal_costs_take_the_fewest_bytes():
    plan = allocate_bits({"a": {2: 1.0, 8: 1.0}}, {"a": {2: 20, 8: 80}}, 100)
    assert plan == {"a": 2}


@pytest.mark.parametrize("seed", range(6))
def test_allocation_by_rank_is_monotone_and_exhausts_the_budget(seed):
    costs, sizes, limit = problem(seed, layers=9)
    ranks = {name: costs[name][2] for name in costs}
    plan = allocate_bits_by_rank(ranks, CHOICES, sizes, limit)
    ordered = [plan[name] for name in sorted(ranks, key=lambda name: -ranks[name])]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(ordered)) <= 2
    used = sum(sizes[name][bits] for name, bits in plan.items())
    assert used <= limit
    first = next((name for name in sorted(ranks, key=lambda n: -ranks[n]) if plan[name] == min(ordered)), None)
    step = CHOICES[CHOICES.index(min(ordered)) + 1]
    assert used + sizes[first][step] - sizes[first][min(ordered)] > limit


def test_a_budget_below_the_smallest_widths_is_refused():
    costs, sizes, _ = problem(0)
    for call in (
        lambda: allocate_bits(costs, sizes, 10),
        lambda: allocate_bits_by_rank(dict.fromkeys(costs, 1.0), CHOICES, sizes, 10),
    ):
        with pytest.raises(ValueError, match="10 bytes do not hold the smallest widths"):
            call()


@pytest.mark.parametrize("columns", [31, 96, 128, 172, 352])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_bytes_of_a_row_are_those_of_the_checkpoint(columns, bits):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    packed = helpers.pack_to_int32(torch.zeros(3, columns, dtype=torch.int8), bits)
    assert packed.numel() * packed.element_size() == 3 * row_bytes(columns, bits)


def test_bytes_of_a_weight():
    assert stored_bytes(10, 64, 4, scales=2, width=2) == 10 * (32 + 4)
    assert stored_bytes(10, 32, 3.5, scales=0) == 10 * 14
    assert stored_bytes(1, 172, 4.0, scales=0) == row_bytes(172, 4) == 88
