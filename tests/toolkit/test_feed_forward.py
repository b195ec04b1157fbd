"""Feed-forward layers are found by what they compute: their parts, their rows and their activation."""

from __future__ import annotations

import pytest
import torch
from tiny_models import DECODER, TINY, tiny_bert, tiny_gpt2, tiny_llama, tiny_opt, tiny_t5
from torch import nn
from transformers import AlbertConfig, AlbertForMaskedLM, Phi3Config, Phi3ForCausalLM

from hf_optim.errors import NumericalError
from hf_optim.toolkit.statistics import RowSample
from hf_optim.toolkit.topology import find_feed_forwards, trace


def found_in(model):
    return find_feed_forwards(trace(model))


@pytest.mark.many(every=4)
@pytest.mark.parametrize(
    ("build", "down", "up", "gate", "activation"),
    [
        (tiny_llama, "model.layers.0.mlp.down_proj", "up_proj", "gate_proj", "silu"),
        (lambda: tiny_llama(hidden_act="relu"), "model.layers.0.mlp.down_proj", "up_proj", "gate_proj", "relu"),
        (tiny_opt, "model.decoder.layers.0.fc2", "fc1", None, "relu"),
        (tiny_gpt2, "transformer.h.0.mlp.c_proj", "c_fc", None, "gelu_new"),
        (tiny_bert, "bert.encoder.layer.0.output.dense", "dense", None, "gelu"),
        (tiny_t5, "encoder.block.0.layer.1.DenseReluDense.wo", "wi", None, "relu"),
    ],
)
def test_layers_of_many_architectures(build, down, up, gate, activation):
    layers, refused = found_in(build())
    first = layers[0]
    assert first.down == down
    assert first.up.name.rpartition(".")[2] == up
    assert (first.gate and first.gate.name.rpartition(".")[2]) == gate
    assert first.activation == activation
    assert len(layers) == (4 if build is tiny_t5 else 2)
    assert not refused


def test_a_fused_projection_holds_gate_and_up():
    with torch.random.fork_rng():
        model = Phi3ForCausalLM(Phi3Config(**DECODER)).eval()
    layers, _ = found_in(model)
    first = layers[0]
    assert first.producers == ("model.layers.0.mlp.gate_up_proj",)
    assert first.gate.index.tolist() == list(range(48))  # Phi-3 has the gate first
    assert first.up.index.tolist() == list(range(48, 96))


@pytest.mark.parametrize("build", [tiny_llama, tiny_opt])
def test_the_parts_compute_the_layer(build):
    model = build().double()
    layer = found_in(model)[0][0]
    x = torch.randn(3, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    up, down = model.get_submodule(layer.up.name), model.get_submodule(layer.down)
    with torch.no_grad():
        if layer.gate is None:
            expected = down(torch.relu(up(x)))
            inner = torch.relu(up(x)[:, layer.up.index])
        else:
            expected = model.model.layers[0].mlp(x)
            gate = model.get_submodule(layer.gate.name)(x)[:, layer.gate.index]
            inner = nn.functional.silu(gate) * up(x)[:, layer.up.index]
        neurons = torch.zeros_like(inner)
        neurons[:, layer.columns] = inner
        torch.testing.assert_close(down(neurons), expected, rtol=0, atol=1e-12)


class Cubed(nn.Module):
    def forward(self, x):
        return x**3 + 0.1


def test_an_unknown_activation_is_reported_with_its_layer():
    model = tiny_llama()
    model.model.layers[1].mlp.act_fn = Cubed()
    layers, refused = found_in(model)
    assert [layer.down for layer in layers] == ["model.layers.0.mlp.down_proj"]
    reason = "between its linear layers is none of transformers' activations"
    assert refused == {reason: ["model.layers.1.mlp.down_proj"]}


def test_shared_layers_experts_and_attention_are_not_feed_forward_layers():
    config = AlbertConfig(vocab_size=64, embedding_size=16, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
    with torch.random.fork_rng():
        assert found_in(AlbertForMaskedLM(config).eval())[0] == []
    assert found_in(TINY["mixtral"]()) == ([], {})


def test_a_sample_of_rows_is_spread_evenly_and_finite():
    layer = nn.Linear(1, 1)
    with RowSample({"a": layer}, size=8) as found, torch.no_grad():
        for begin in range(0, 100, 10):
            layer(torch.arange(begin, begin + 10.0).view(2, 5, 1))
    rows = found["a"].flatten().tolist()
    assert rows == list(range(0, 100, 8))
    with pytest.raises(NumericalError, match="the input of a holds infinite"), RowSample({"a": layer}, size=8):
        layer(torch.full((1, 1), torch.inf))
