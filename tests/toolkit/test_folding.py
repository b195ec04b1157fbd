"""Folding of scales and permutations: the effect on weights and function, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_qwen2

from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding


def logits(model):
    with torch.no_grad():
        return model(**topology.dummy_inputs(model)).to_tuple()[0]


def scale(count, seed=0):
    return torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 50 + 0.02


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_opt, tiny_qwen2])
def test_large_scales_over_every_norm_and_pair_preserve_the_function(build):
    model = build().double()
    before, start = logits(model), copy.deepcopy(model.state_dict())
    trace = topology.trace(model)
    moved = 0
    for pair in topology.find_linear_pairs(trace):
        if pair.scalable:
            folding.move_pair_scale_(pair, scale(pair.groups.numel()))
            moved += 1
    for group in topology.find_norm_groups(trace):
        if group.exclusive:
            folding.move_norm_scale_(group, scale(group.module.weight.numel(), 1))
            moved += 1
    assert moved >= 6
    assert sum(not torch.equal(value, start[name]) for name, value in model.state_dict().items()) >= 6
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-10)


def test_norm_and_columns_scale_inversely():
    model = tiny_llama().double()
    group = next(g for g in topology.find_norm_groups(model) if g.name == "model.layers.0.input_layernorm")
    gain = group.module.weight.detach().clone()
    columns = {name: module.weight.detach().clone() for name, module in group.linears.items()}
    factor = scale(32)
    folding.move_norm_scale_(group, factor)
    assert torch.allclose(group.module.weight, gain / factor, rtol=1e-14)
    assert len(columns) == 3
    for name, weight in columns.items():
        assert torch.equal(model.get_submodule(name).weight, weight * factor)


def test_rows_are_scaled_with_their_bias():
    model = tiny_qwen2().double()
    pair = next(p for p in topology.find_linear_pairs(model) if p.producer.endswith("0.self_attn.v_proj"))
    bias = pair.producer_module.bias.detach().clone()
    factor = scale(16)
    folding.move_pair_scale_(pair, factor)
    assert torch.allclose(pair.producer_module.bias, bias / factor, rtol=1e-14)


def test_grouped_heads_share_their_rows():
    pair = next(p for p in topology.find_linear_pairs(tiny_llama()) if p.producer.endswith("0.self_attn.v_proj"))
    peaks = torch.arange(32.0)
    # 4 heads of 8 channels on 2 key/value heads: rows 0..7 feed the columns 0..7 and 8..15.
    assert torch.equal(folding.max_over_columns(pair, peaks)[:8], torch.arange(8.0, 16.0))
    spread = folding.expand_to_columns(pair, torch.arange(16.0))
    assert torch.equal(spread[:8], spread[8:16])
    assert torch.equal(spread[16:24], torch.arange(8.0, 16.0))


def test_a_half_precision_weight_keeps_its_dtype():
    model = tiny_llama().to(torch.bfloat16)
    group = topology.find_norm_groups(model)[0]
    folding.move_norm_scale_(group, scale(32))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}


def test_refusals():
    bert = tiny_bert()
    shared = next(g for g in topology.find_norm_groups(bert) if not g.exclusive)
    with pytest.raises(ValueError, match="also read by"):
        folding.move_norm_scale_(shared, torch.ones(32))
    pair = next(p for p in topology.find_linear_pairs(bert) if not p.scalable)
    with pytest.raises(ValueError, match="not homogeneous"):
        folding.move_pair_scale_(pair, torch.ones(pair.groups.numel()))
    group = topology.find_norm_groups(tiny_llama())[0]
    for bad in (torch.zeros(32), torch.full((32,), float("nan")), -torch.ones(32)):
        with pytest.raises(ValueError, match="positive and finite"):
            folding.move_norm_scale_(group, bad)
    with pytest.raises(ValueError, match="32 channels"):
        folding.move_norm_scale_(group, torch.ones(3))


def test_a_permutation_moves_rows_columns_and_gates_together():
    model = tiny_llama().double()
    before = logits(model)
    pair = next(p for p in topology.find_linear_pairs(model) if p.consumer.endswith("0.mlp.down_proj"))
    up = pair.producer_module.weight.detach().clone()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    folding.permute_pair_(pair, order)
    assert torch.equal(pair.producer_module.weight, up[order])
    assert torch.allclose(logits(model), before, rtol=0, atol=1e-12)
