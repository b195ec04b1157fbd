"""No technique of the catalogue changes a router or the gate of a shared expert, unless it is named exactly."""

from __future__ import annotations

import dataclasses

import pytest
import tiny_mixtures
import torch
from routed_llama import ROUTING, routed_llama
from torch import nn

import hf_optim
from hf_optim.recipes.catalogue import catalogue
from hf_optim.testing.tiny_runs import inputs_for, optimize_tiny
from hf_optim.toolkit import topology

PERMUTES = {"channel_permutation", "peg"}
ROTATES = {"rotation"}
"""They reorder the channels that a router reads together with all other layers that read them."""

STOCK_CLASS = {"awq", "gobo", "local", "peg", "rotation", "smoothquant", "structured", "upcycle"}
STOCK_CLASS |= {"batch_priority_routing", "capacity_routing", "dynamoe", "hierarchical_all_to_all", "tutel"}
STOCK_CLASS |= {"moefication", "pr_moe", "sparse_ffn", "task_moe", "vmoe"}
STOCK_CLASS |= {"act", "adaptive_span", "axial", "big_bird", "blockwise", "compressed", "compressive_transformer"}
STOCK_CLASS |= {"dilated", "etc", "linformer", "longformer", "performer", "reformer", "rfa", "routing_transformer"}
STOCK_CLASS |= {"set_transformer", "sinkhorn", "sparse_transformer", "strided", "transformer_xl"}
STOCK_CLASS |= {"parallelism", "sparse_qkv", "terraformer", "universal_transformer"}
"""They write code for a class of transformers, or take its experts: here Qwen2-MoE, whose gates are linear layers."""

REFUSES = dict.fromkeys(
    [
        "act",
        "moefication",
        "pr_moe",
        "sparse_ffn",
        "task_moe",
        "terraformer",
        "universal_transformer",
        "upcycle",
        "vmoe",
    ],
    "does not support a model that routes tokens to experts",
)
REFUSES |= dict.fromkeys(["big_bird", "linformer", "set_transformer"], "is causal")
REFUSES |= {"padding_removal": "is removed from encoders of text"}
"""Techniques that do not take a model with experts, or none of this kind, and why."""

NAMED = ["gptq", "lkd", "llm_int8", "mixed_precision", "obq", "qat", "rtn", "signround", "zeroquant", "gobo"]
NAMED += ["gmp", "iterative", "l0", "lottery_ticket", "magnitude", "nm", "sr_ste", "top_kast", "variational_dropout"]


def a_mixture(name: str):
    """Return a mixture that a technique takes, and the names of what routes in it."""
    if name not in STOCK_CLASS:
        return routed_llama(), ROUTING
    model = tiny_mixtures.build("qwen2_moe", shared_expert_intermediate_size=32)
    routing = [f"model.layers.{index}.mlp.{part}" for index in (0, 1) for part in ("shared_expert_gate", "gate")]
    for part in routing:
        model.get_submodule(part).requires_grad_(False)
    return model, tuple(routing)


def test_the_roles_of_the_model():
    found = topology.roles(routed_llama())
    assert {name: str(role) for name, role in found.items()} == {
        **dict.fromkeys(ROUTING[::2], "router"),
        **dict.fromkeys(ROUTING[1::2], "gate of a shared expert"),
        "lm_head": "output head",
    }


@pytest.mark.many
@pytest.mark.parametrize("name", catalogue().names())
def test_a_technique_leaves_what_routes_alone(name, tmp_path):
    cls, (model, routing) = catalogue().get(name), a_mixture(name)
    before = {key: model.get_submodule(key).weight.clone() for key in routing}
    classes = {key: type(model.get_submodule(key)) for key in routing}
    if name in REFUSES:
        with pytest.raises(hf_optim.OptimError, match=REFUSES[name]):
            optimize_tiny(cls, model, tmp_path)
        return
    model = optimize_tiny(cls, model, tmp_path)
    kept = [key for key in routing if key in dict(model.named_modules())]
    assert len(kept) >= 2  # distillation may drop a layer
    stored = model.state_dict()  # weights of an offloaded block have values only there
    for key in kept:
        layer, weights = model.get_submodule(key), (stored[f"{key}.weight"], before[key])
        same = [weight.sort().values if name in PERMUTES else weight for weight in weights]
        if name in ROTATES:  # columns follow the stream; the inner products of rows stay
            torch.testing.assert_close(*(weight @ weight.T for weight in same), atol=1e-6, rtol=1e-5)
        else:
            assert torch.equal(*same), key
        assert type(layer) is classes[key]
        assert getattr(layer, "quantization_scheme", None) is None
        assert not layer._forward_hooks
        assert not layer._forward_pre_hooks
    assert not {f"{key}.weight" for key in kept} & set(hf_optim.run_of(model).masks)


def test_a_permutation_of_the_channels_that_a_router_reads_changes_no_choice():
    model = routed_llama()
    batch, before = inputs_for(model, seed=7, rows=8), model.get_submodule(ROUTING[0]).weight.clone()
    chosen, logits = model.chosen(**batch), model(**batch).logits
    model = hf_optim.optimize(model, {"technique": "channel_permutation", "tries": 0, "starts": 8})
    assert not torch.equal(model.get_submodule(ROUTING[0]).weight, before)
    assert torch.equal(model.chosen(**batch), chosen)
    torch.testing.assert_close(model(**batch).logits, logits, atol=1e-5, rtol=1e-4)


@pytest.mark.many
@pytest.mark.parametrize("name", NAMED)
def test_a_technique_works_on_what_routes_if_it_is_named_exactly(name, tmp_path, monkeypatch):
    cls, (model, routing) = catalogue().get(name), a_mixture(name)
    step = cls.for_testing()
    named = dataclasses.replace(step, targets=(routing[0], "*.self_attn.*"))
    monkeypatch.setattr(cls, "for_testing", classmethod(lambda cls: named))
    model.requires_grad_(True)
    before = model.get_submodule(routing[0]).weight.clone()
    model = optimize_tiny(cls, model, tmp_path)
    layer = model.get_submodule(routing[0])
    masked = f"{routing[0]}.weight" in hf_optim.run_of(model).masks
    changed = getattr(layer, "quantization_scheme", None) is not None or type(layer) is not nn.Linear
    assert not torch.equal(layer.weight, before)
    assert masked or changed
    assert f"{routing[2]}.weight" not in hf_optim.run_of(model).masks
