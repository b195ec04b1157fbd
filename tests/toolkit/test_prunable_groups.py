"""Units: what belongs to a head or a neuron, found in fused and separate projections, on every family."""

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
    "gpt_neox": ("GPTNeoX", SMALL),  # q, k and v of a head beside each other
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
def test_what_belongs_to_a_unit_matters_to_nothing_once_the_unit_is_not_read(family):
    """Random numbers for all entries of one unit, its reader's columns zero: no output moves. Without that, they do."""
    model = BUILDERS[family]().double()
    model.config._experts_implementation = "eager"  # the fused kernels know no float64
    inputs = dummy_inputs(model)
    units = find_prunable_groups(trace(model))
    assert {one.kind for one in units} == ({HEADS} if family == "mixtral" else {HEADS, NEURONS})
    for together in coupled_layers(units):
        state = {name: parameter.clone() for name, parameter in model.named_parameters()}
        entries = {}
        for one in together:
            reader = f"{one.consumer}.weight"
            dim, columns = one.entries[reader]
            model.get_parameter(reader).index_fill_(dim, columns[1], 0.0)
            entries |= {name: part for name, part in one.entries.items() if name != reader}
        unread = main_output(model, inputs)
        for name, (dim, parts) in entries.items():
            parameter = model.get_parameter(name)
            parameter.index_copy_(dim, parts[1], torch.randn_like(parameter.index_select(dim, parts[1])))
        assert torch.equal(main_output(model, inputs), unread)
        for name, (dim, parts) in entries.items():
            other = model.get_parameter(name)
            other.index_add_(dim, parts[0], torch.ones_like(other.index_select(dim, parts[0])))
        assert not torch.equal(main_output(model, inputs), unread)
        for name, before in state.items():
            model.get_parameter(name).copy_(before)


def test_a_unit_of_grouped_queries_is_a_key_value_head_with_its_query_heads():
    heads = next(one for one in find_prunable_groups(trace(TINY["llama"]())) if one.kind == HEADS)
    assert (len(heads), heads.width, heads.query_heads) == (2, 8, 2)
    assert heads.block == "model.layers.0"
    attention = "model.layers.0.self_attn"
    assert torch.equal(heads.entries[f"{attention}.q_proj.weight"][1], torch.arange(32).view(2, 16))
    assert torch.equal(heads.entries[f"{attention}.k_proj.weight"][1], torch.arange(16).view(2, 8))
    assert torch.equal(heads.columns, torch.arange(32).view(2, 16))


def test_fused_projections_are_taken_apart():
    phi = {one.kind: one for one in find_prunable_groups(trace(fused("phi3"))) if one.block == "model.layers.0"}
    _, rows = phi[HEADS].entries["model.layers.0.self_attn.qkv_proj.weight"]
    assert torch.equal(rows[0], torch.cat([torch.arange(16), torch.arange(32, 40), torch.arange(48, 56)]))
    _, rows = phi[NEURONS].entries["model.layers.0.mlp.gate_up_proj.weight"]
    assert [sorted(row) for row in rows.tolist()] == [[n, 40 + n] for n in range(40)]
    neox = next(one for one in find_prunable_groups(trace(fused("gpt_neox"))) if one.kind == HEADS)
    _, rows = neox.entries["gpt_neox.layers.0.attention.query_key_value.bias"]
    assert torch.equal(rows, torch.arange(96).view(4, 24))


def test_layers_that_share_position_biases_lose_the_same_heads():
    together = [
        sorted(one.consumer for one in group) for group in coupled_layers(find_prunable_groups(trace(TINY["t5"]())))
    ]
    assert ["encoder.block.0.layer.0.SelfAttention.o", "encoder.block.1.layer.0.SelfAttention.o"] in together
    assert ["decoder.block.0.layer.0.SelfAttention.o", "decoder.block.1.layer.0.SelfAttention.o"] in together
    assert ["decoder.block.0.layer.1.EncDecAttention.o"] in together


def test_heads_that_hold_no_weights_need_none():
    """On the meta device: nothing is computed with the model's own numbers."""
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    assert [one.kind for one in find_prunable_groups(trace(model))] == [HEADS, NEURONS] * 2
