"""Rows of queries, keys and values, by the effect of each row and by the layouts that architectures document."""

from __future__ import annotations

import pytest
import torch
from tiny_models import TINY

from hf_optim.testing.sweep.checks import build
from hf_optim.toolkit import topology
from hf_optim.toolkit.topology import dummy_inputs

# GPT-BigCode of transformers 5.17 scripts functions when it is imported, of which torch warns.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script`:DeprecationWarning")

WIDTH = 8


def rows(start, heads, width=WIDTH, stride=None):
    return [list(range(start + h * (stride or width), start + h * (stride or width) + width)) for h in range(heads)]


# Model -> rows of keys and of values: separate, one kind after the other, the three kinds of each head in turn.
LAYOUTS = {
    "llama": (rows(0, 2), rows(0, 2)),
    "gpt2": (rows(32, 4), rows(64, 4)),
    "opt": (rows(0, 4), rows(0, 4)),
    "bert": (rows(0, 4), rows(0, 4)),
    "vit": (rows(0, 4), rows(0, 4)),
    "mixtral": (rows(0, 2), rows(0, 2)),
    "Phi3ForCausalLM": (rows(64, 4, 16), rows(128, 4, 16)),
    "GPTNeoXForCausalLM": (rows(16, 4, 16, 48), rows(32, 4, 16, 48)),
    "GPTBigCodeForCausalLM": (rows(64, 1, 16), rows(80, 1, 16)),
}


def model_of(name):
    return TINY[name]() if name in TINY else build(name)


@pytest.mark.parametrize("name", LAYOUTS)
def test_rows_are_those_of_the_architecture(name):
    found = topology.find_key_value_heads(topology.trace(model_of(name)))
    assert len(found) == 2
    for one in found:
        assert (one.keys.index.tolist(), one.values.index.tolist()) == LAYOUTS[name]
        assert one.query_heads * len(one) == 4
        assert not one.crosses
        assert one.consumer.startswith(one.block)


def test_cross_attention_is_told_from_self_attention():
    found = topology.find_key_value_heads(topology.trace(TINY["t5"]()))
    assert [(one.module.rpartition(".")[2], one.crosses) for one in found] == [
        ("SelfAttention", False),
        ("SelfAttention", False),
        ("SelfAttention", False),
        ("EncDecAttention", True),
        ("SelfAttention", False),
        ("EncDecAttention", True),
    ]


@torch.no_grad()
def test_a_row_of_values_scales_what_its_head_adds_and_one_of_keys_does_not():
    model = build("GPTNeoXForCausalLM").double()
    one = topology.find_key_value_heads(topology.trace(model))[0]
    layer, attention = model.get_submodule(one.keys.layer), model.get_submodule(one.module)
    heads = []
    hook = attention.get_submodule("dense").register_forward_pre_hook(
        lambda module, args: heads.append(args[0].clone())
    )
    for kind in (None, one.queries, one.keys, one.values):
        before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
        if kind is not None:
            for parameter in layer.parameters():
                parameter[kind.index[1]] *= 3
        model(**dummy_inputs(model))
        layer.load_state_dict(before)
    hook.remove()
    plain, queries, keys, values = (output.unflatten(-1, (4, -1)) for output in heads)
    for changed in (queries, keys, values):  # nothing else is of head 1
        others = [0, 2, 3]
        assert torch.equal(changed[..., others, :], plain[..., others, :])
    assert torch.allclose(values[..., 1, :], 3 * plain[..., 1, :])
    assert not torch.allclose(keys[..., 1, :], plain[..., 1, :])
    # The first token of a causal model sees itself alone, whatever its score.
    assert torch.allclose(keys[:, 0, 1], plain[:, 0, 1])
    assert torch.allclose(queries[:, 0, 1], plain[:, 0, 1])


@pytest.mark.parametrize("name", ["Olmo2ForCausalLM", "DeepseekV3ForCausalLM", "AlbertModel"])
def test_heads_that_cannot_be_told_are_left_out(name):
    assert topology.find_key_value_heads(topology.trace(build(name))) == []
