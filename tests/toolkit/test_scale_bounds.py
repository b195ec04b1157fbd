"""Folded scales in half precision: both sides stay finite and keep their precision, and so does the function."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import tiny_llama, tiny_opt
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM

from hf_optim import OptimConfig, Scope
from hf_optim.lifecycle.stages import start_run
from hf_optim.toolkit import topology
from hf_optim.toolkit.permutation import folding, scale_bounds
from hf_optim_plugins.quantization.smoothquant import SmoothQuant

HALVES = (torch.float16, torch.bfloat16)


def logits(model, seed=0):
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model.float()(input_ids=ids).logits


def tiny_gemma2():
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    ).eval()


@pytest.mark.many
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("build", [tiny_llama, tiny_opt, tiny_gemma2])
@pytest.mark.parametrize("factor", [1e-5, 1e-2, 37.0, 1e5])
def test_bounded_scales_of_any_size_preserve_the_function(build, factor, dtype):
    model = build().to(dtype)
    expected = logits(copy.deepcopy(model))
    trace = topology.trace(model)
    for pair in topology.find_linear_pairs(trace):
        if pair.scalable:
            scale = torch.full((pair.groups.numel(),), factor, dtype=torch.float64)
            folding.move_pair_scale_(pair, scale_bounds.bound_pair_scale(pair, scale))
    for group in topology.find_norm_groups(trace):
        if group.exclusive:
            scale = torch.full((group.module.weight.numel(),), factor, dtype=torch.float64)
            bounded = scale_bounds.bound_norm_scale(group, scale)
            assert bounded.dtype == scale.dtype
            folding.move_norm_scale_(group, bounded)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    found = logits(model)
    # Each weight is rounded once more.
    assert float((found - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps


def test_scales_that_the_dtype_can_hold_are_not_changed():
    model = tiny_llama().half()
    group = next(group for group in topology.find_norm_groups(model) if group.exclusive)
    scale = torch.linspace(0.1, 100, 32, dtype=torch.float64)
    assert torch.equal(scale_bounds.bound_norm_scale(group, scale), scale)
    wide = next(group for group in topology.find_norm_groups(tiny_llama()) if group.exclusive)
    scale = torch.logspace(-5, 5, 32, dtype=torch.float64)
    assert torch.equal(scale_bounds.bound_norm_scale(wide, scale), scale)


def test_products_are_rounded_once():
    """A scale rounded to bfloat16 first would add an error of its own."""
    linear = nn.Linear(4, 3).bfloat16()
    weight = linear.weight.detach().clone()
    factor = torch.tensor([1.003, 0.777, 3.1416, 1e-3], dtype=torch.float64)
    folding.scale_columns_(linear, factor)
    assert torch.equal(linear.weight, (weight.float() * factor.float()).bfloat16())


@pytest.mark.many
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tiny", [1e-5, 3e-6, 1e-2])
def test_smoothquant_in_half_precision(tiny, alpha, dtype):
    # The gain of 300 meets weights that are small enough that attention does not saturate: there, rounding once more
    # decides between two tokens.
    model = tiny_llama()
    layer = model.model.layers[0]
    with torch.no_grad():
        for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.up_proj):
            linear.weight[:, 3] *= tiny
        layer.input_layernorm.weight[3] = 300.0
        layer.mlp.gate_proj.weight[:, 5] = 6e4 if dtype == torch.float16 else 1.0
        layer.post_attention_layernorm.weight[5] = 1e-4
    model = model.to(dtype)
    expected = logits(copy.deepcopy(model))
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    recipe = OptimConfig.parse([SmoothQuant(alpha=alpha)])
    run = start_run(recipe, model.config)
    run.model = model
    with torch.no_grad():
        for _ in recipe.steps[0].calibrate(run, Scope("", model, model)):
            model(input_ids=ids)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    found = logits(model)
    assert float((found - expected).norm() / expected.norm()) < 8 * torch.finfo(dtype).eps
