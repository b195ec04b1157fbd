"""Synthetic outliers: large channels where reported, the same function, and a model that is harder to quantize."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_models import TINY, tiny_bert, tiny_llama

import hf_optim
from hf_optim.testing.outliers import add_synthetic_outliers
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.statistics.observers import ChannelAbsMax


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


def in_double(family):
    model = TINY[family]().double()
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs_for(model).items()}
    return model, inputs


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "bert", "vit", "t5"])
def test_the_function_stays_and_the_channels_grow(family):
    model, inputs = in_double(family)
    before, reference = logits(model, inputs), copy.deepcopy(model)
    outliers = add_synthetic_outliers(model, channels=2, factor=50.0, sample=inputs)
    # Norms that compute in float32 whatever the model's dtype is round differently.
    bound = 1e-12 if family in ("gpt2", "opt", "bert", "vit") else 1e-5
    assert torch.allclose(logits(model, inputs), before, rtol=0, atol=bound * float(before.abs().max()))
    names = {name: model.get_submodule(name) for name in outliers.inputs}
    with ChannelAbsMax(names) as now:
        logits(model, inputs)
    with ChannelAbsMax({name: reference.get_submodule(name) for name in names}) as then:
        logits(reference, inputs)
    for name, channels in outliers.inputs.items():
        others = torch.ones_like(now[name], dtype=torch.bool)
        others[channels] = False
        assert float(now[name][channels].min()) > 15 * float(now[name][others].median()), name
        assert torch.allclose(now[name][others], then[name][others], rtol=1e-4)


def test_a_post_norm_model_gets_them_in_its_value_channels_only():
    outliers = add_synthetic_outliers(tiny_bert(), channels=2)
    # Only the pooler reads the last norm of a classifier.
    layers = {f"bert.encoder.layer.{i}.attention.output.dense" for i in (0, 1)}
    assert set(outliers.inputs) == {*layers, "bert.pooler.dense"}


def test_each_kind_can_be_left_out():
    norms, pairs = (
        add_synthetic_outliers(tiny_llama(), pairs=False).inputs,
        add_synthetic_outliers(tiny_llama(), norms=False).inputs,
    )
    assert not norms.keys() & pairs.keys()
    assert set(pairs) == {f"model.layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.o_proj", "mlp.down_proj")}
    with pytest.raises(ValueError, match="LlamaForCausalLM has no norm"):
        add_synthetic_outliers(tiny_llama(), norms=False, pairs=False)


def test_8_bit_weights_lose_little_and_static_8_bit_activations_much():
    model = tiny_llama()
    batches = [inputs_for(model, seed=s, rows=4) for s in range(3)]
    add_synthetic_outliers(model, factor=20.0, sample=batches[0])
    reference = logits(model, batches[0])

    def error(**fields):
        made = hf_optim.optimize(copy.deepcopy(model), [{"technique": "rtn", **fields}], calibration=batches)
        return float((logits(made, batches[0]) - reference).norm() / reference.norm())

    assert error() < 0.1
    assert error(activations="int8", dynamic=False) > 5 * error()
