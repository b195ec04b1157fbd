"""Prunable groups: the parameter entries of heads and neurons, in fused and separate projections of every family."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny_models import TINY

from hf_optim.toolkit.modules.compare import main_output
from hf_optim.toolkit.topology.fake_inputs import dummy_inputs
from hf_optim.toolkit.topology.prunable_groups import HEADS, NEURONS, coupled_layers, find_prunable_groups
from hf_optim.toolkit.topology.tracing import trace

SMALL = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
FUSED = {
    "phi3": ("Phi3", GROUPED),  # one projection for q, k and v, one after the other; one for gate and up
    "gpt_neox": ("GPTNeoX", SMALL),  # q, k and v of a head next to each other
    "qwen3": ("Qwen3", {**GROUPED, "head_dim": 8}),  # norms that all heads share
}


def fused(name):
    family, fields = FUSED[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(transformers, f"{family}Config")(**fields)
        return getattr(transformers, f"{family}ForCausalLM")(config).eval()


BUILDERS = {**TINY, **{name: lambda name=name: fused(name) for name in FUSED}}


@pytest.mark.parametrize("family", BUILDERS)
@torch.no_grad()
def test_entries_of_a_group_affect_no_output_once_its_consumer_columns_are_zero(family):
    """With the consumer's columns zero, random entries of the group change no output; those of another group do."""
    model = BUILDERS[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernels do not support float64
    inputs = dummy_inputs(model)
    layers = find_prunable_groups(trace(model))
    assert {groups.kind for groups in layers} == ({HEADS} if family == "mixtral" else {HEADS, NEURONS})
    for coupled in coupled_layers(layers):
        state = {name: parameter.clone() for name, parameter in model.named_parameters()}
        entries = {}
        for groups in coupled:
            consumer = f"{groups.consumer}.weight"
            dim, columns = groups.entries[consumer]
            model.get_parameter(consumer).index_fill_(dim, columns[1], 0.0)
            entries |= {name: part for name, part in groups.entries.items() if name != consumer}
        expected = main_output(model, inputs)
        for name, (dim, parts) in entries.items():
            parameter = model.get_parameter(name)
            parameter.index_copy_(dim, parts[1], torch.randn_like(parameter.index_select(dim, parts[1])))
        assert torch.equal(main_output(model, inputs), expected)
        for name, (dim, parts) in entries.items():
            other = model.get_parameter(name)
            other.index_add_(dim, parts[0], torch.ones_like(other.index_select(dim, parts[0])))
        assert not torch.equal(main_output(model, inputs), expected)
        for name, before in state.items():
            model.get_parameter(name).copy_(before)


def test_a_group_of_grouped_query_attention_is_a_key_value_head_with_its_query_heads():
    heads = next(one for one in find_prunable_groups(trace(TINY["llama"]())) if one.kind == HEADS)
    assert (len(heads), heads.width, heads.query_heads) == (2, 8, 2)
    assert heads.block == "model.layers.0"
    attention = "model.layers.0.self_attn"
    assert torch.equal(heads.entries[f"{attention}.q_proj.weight"][1], torch.arange(32).view(2, 16))
    assert torch.equal(heads.entries[f"{attention}.k_proj.weight"][1], torch.arange(16).view(2, 8))
    assert torch.equal(heads.columns, torch.arange(32).view(2, 16))


def test_entries_of_fused_projections():
    phi = {one.kind: one for one in find_prunable_groups(trace(fused("phi3"))) if one.block == "model.layers.0"}
    _, rows = phi[HEADS].entries["model.layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(rows[0], torch.cat([torch.arange(16), torch.arange(32, 40), torch.arange(48, 56)]))
    _, rows = phi[NEURONS].entries["model.layers.0.mlp.gate_up_proj.weight"]
    assert [sorted(row) for row in rows.tolist()] == [[n, 40 + n] for n in range(40)]
    neox = next(one for one in find_prunable_groups(trace(fused("gpt_neox"))) if one.kind == HEADS)
    _, rows = neox.entries["gpt_neox.layers.0.attention.query_key_value.bias"]
    assert torch.equal(rows, torch.arange(96).view(4, 24))


def test_layers_that_share_position_biases_are_coupled():
    together = [
        sorted(one.consumer for one in group) for group in coupled_layers(find_prunable_groups(trace(TINY["t5"]())))
    ]
    assert ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.1.layer.0.SelfAttention.o"] in together
    assert ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.1.layer.0.SelfAttention.o"] in together
    assert ["decoder.block.0.layer.1.EncDecAttention.o"] in together


def test_groups_are_found_on_the_meta_device():
    """Nothing is computed with the weights of the model."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    assert [one.kind for one in find_prunable_groups(trace(model))] == [HEADS, NEURONS] * 2
