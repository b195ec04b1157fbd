"""Norms of a captured step: which are fused, that they compute the same, and that the model is as before."""

from __future__ import annotations

import pytest
import torch
import transformers
from simulated_graphs import simulated_graphs
from tiny_models import tiny_llama
from torch import nn

import hf_optim
from hf_optim.generation.norms import fused_norms


def norms(model):
    return [module for module in model.modules() if "Norm" in type(module).__name__]


def fused(model):
    with fused_norms(model):
        return ["forward" in vars(module) for module in norms(model)]


def test_norms_of_a_llama_are_fused_and_put_back():
    model = tiny_llama()
    with torch.no_grad():
        for norm in norms(model):
            norm.weight.uniform_(0.5, 1.5)
    ids = torch.tensor([[3, 4, 5]])
    before = model(ids).logits
    with fused_norms(model):
        assert all(type(vars(norm)["forward"]).__name__ == "_Fused" for norm in norms(model))
        torch.testing.assert_close(model(ids).logits, before, rtol=1e-5, atol=1e-5)
    assert not any("forward" in vars(norm) for norm in norms(model))
    assert torch.equal(model(ids).logits, before)


def test_what_is_not_a_plain_norm_is_left_alone():
    config = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    gemma = transformers.GemmaForCausalLM(transformers.GemmaConfig(**config))
    with torch.no_grad():
        for norm in norms(gemma):
            norm.weight.uniform_(0.5, 1.5)
    assert not any(fused(gemma))  # multiplies with 1 + weight

    llama = tiny_llama()
    hooked, *_ = norms(llama)
    handle = hooked.register_forward_hook(lambda *_: None)
    assert fused(llama).count(False) == 1
    handle.remove()
    assert all(fused(llama))
    assert not any(fused(nn.Sequential(nn.LayerNorm(4))))


def test_a_wider_input_keeps_the_arithmetic_of_the_class():
    model = tiny_llama().bfloat16()
    norm, values = norms(model)[0], torch.randn(2, 3, 32)
    expected = norm(values)
    with fused_norms(model):
        assert torch.equal(norm(values), expected)
        close = norm(values.bfloat16()).float()
    torch.testing.assert_close(close, expected, rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("settings", [{}, {"do_sample": True, "top_k": 8}], ids=str)
def test_a_captured_step_gives_the_tokens_of_transformers(settings):
    model, ids = tiny_llama().eval(), torch.tensor([[3, 4, 5, 6]])
    torch.manual_seed(1)
    expected = model.generate(ids, max_new_tokens=10, **settings)
    torch.manual_seed(1)
    with simulated_graphs() as graphs:
        assert torch.equal(hf_optim.generate(model, ids, max_new_tokens=10, mode="captured", **settings), expected)
    assert len(graphs.captured) == 1
    assert not any("forward" in vars(norm) for norm in norms(model))
