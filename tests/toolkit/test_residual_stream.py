"""The residual stream: found in every architecture, and permuted without changing the outputs."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from tiny_models import TINY, tiny_bert, tiny_gpt2, tiny_llama
from torch import nn
from transformers import BertModel

from hf_optim import ModelError
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit import topology
from hf_optim.toolkit.topology import find_residual_stream, permute_residual_


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def shuffled(width, seed=0):
    return torch.randperm(width, generator=torch.Generator().manual_seed(seed))


def doubled(inputs):
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("family", ["gpt2", "opt", "bert", "vit"])
def test_a_permutation_is_exact_in_float64(family):
    model = TINY[family]().double()
    inputs = doubled(inputs_for(model))
    before = logits(model, inputs)
    permute_residual_(model, shuffled(32))
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-13)


@pytest.mark.parametrize("family", ["llama", "qwen2", "t5", "mixtral"])
def test_a_permutation_is_exact_where_norms_compute_in_float32(family):
    model = TINY[family]()
    inputs = inputs_for(model)
    before = logits(model, inputs)
    permute_residual_(model, shuffled(32))
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-5 * float(before.abs().max()))


@pytest.mark.parametrize("kind", ["Bert", "Roberta", "DistilBert", "ModernBert"])
def test_a_tied_head_with_its_own_stream_is_permuted_too(kind):
    """The head of a masked language model shares the embedding's weight; a transform is between the stream and it."""
    names = {"DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}}
    sizes = names.get(
        kind, {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(vocab_size=64, pad_token_id=0, **sizes)
    model = getattr(transformers, f"{kind}ForMaskedLM")(config).double().eval()
    inputs = {"input_ids": torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))}
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    before, table = logits(model, inputs), model.get_input_embeddings().weight.detach().clone()
    permute_residual_(model, order := shuffled(32))
    assert torch.equal(model.get_input_embeddings().weight, table[:, order])
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=1e-6)


@pytest.mark.parametrize("family", TINY)
def test_the_stream_itself_is_permuted(family):
    model = TINY[family]()
    inputs, order = inputs_for(model), shuffled(32)
    other = copy.deepcopy(model)
    residual = permute_residual_(other, order)
    reader = residual.readers[0]
    seen = []
    for each in (model, other):
        handle = each.get_submodule(reader).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        logits(each, inputs)
        handle.remove()
    assert torch.allclose(seen[1], seen[0][..., order], atol=1e-5)
    assert not torch.allclose(seen[1], seen[0], atol=1e-2)


def test_the_residual_stream_of_a_llama():
    residual = find_residual_stream(tiny_llama())
    assert residual.width == 32
    assert set(residual.writers) == {
        f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")
    }
    assert len(residual.readers) == 2 * 5 + 1
    assert residual.norms[0] == "model.layers.0.input_layernorm"
    assert residual.norms[-1] == "model.norm"
    assert residual.parameters["model.embed_tokens.weight"] == (1,)
    assert not residual.returned


def test_only_one_dimension_of_a_square_matrix_follows_the_stream():
    # 32 x 32: only the columns of the query and only the rows of the output projection follow the stream.
    parameters = find_residual_stream(tiny_bert()).parameters
    layer = "bert.encoder.layer.0.attention"
    assert parameters[f"{layer}.self.query.weight"] == (1,)
    assert parameters[f"{layer}.output.dense.weight"] == (0,)
    assert f"{layer}.self.query.bias" not in parameters


def test_a_tied_head_is_permuted_once():
    model = tiny_gpt2().double()
    assert model.lm_head.weight is model.transformer.wte.weight
    table, order = model.lm_head.weight.detach().clone(), shuffled(32)
    permute_residual_(model, order)
    assert torch.equal(model.lm_head.weight, table[:, order])
    assert model.lm_head.weight is model.transformer.wte.weight


def test_a_model_that_returns_its_stream_is_refused_and_unchanged():
    with torch.random.fork_rng():
        model = BertModel(tiny_bert().config).eval()
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="returns its residual stream"):
        permute_residual_(model, shuffled(32))
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_an_order_that_is_not_a_permutation_is_refused():
    with pytest.raises(ValueError, match="not a permutation of 32"):
        permute_residual_(tiny_llama(), torch.zeros(32, dtype=torch.int64))


def test_a_permutation_that_changes_the_outputs_is_undone(monkeypatch):
    model = tiny_llama()
    residual = find_residual_stream(model)
    broken = copy.copy(residual)
    object.__setattr__(broken, "parameters", {k: v for k, v in residual.parameters.items() if "lm_head" not in k})
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(ModelError, match="changes its outputs"):
        permute_residual_(model, shuffled(32), broken)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_a_model_without_blocks_is_refused():
    model = tiny_llama(num_hidden_layers=0)
    assert not topology.blocks(model)
    with pytest.raises(ModelError, match="no sequence of blocks"):
        find_residual_stream(model)


class Mixed(nn.Module):
    """A linear layer of inputs to which a convolution over their channels is added."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.conv = nn.Conv1d(32, 32, 1)

    def forward(self, states):
        own = (2 * states).transpose(1, 2)  # known to carry the stream only after what the convolution returns
        return self.inner(states + self.conv(own).transpose(1, 2))


def test_a_convolution_over_the_channels_of_the_stream_is_found_from_both_sides():
    model = tiny_llama()
    for layer in model.model.layers:
        layer.self_attn.q_proj = Mixed(layer.self_attn.q_proj)
    with pytest.raises(ModelError, match="conv: convolution does to the residual stream depends on the order"):
        find_residual_stream(model)
