"""Architectures with something of their own: odd inputs, conversions, weights that only look like experts.

Each is built tiny and checked as the sweep checks it: compressed, saved, reloaded by stock transformers to bit-equal
logits, and loaded with ``optim_config="auto"``.
"""

from __future__ import annotations

import re

import pytest
import torch

import hf_optim
from hf_optim import ModelError
from hf_optim.runs.run import run_of
from hf_optim.testing.sweep import checks
from hf_optim.testing.sweep.inputs import random_inputs
from hf_optim.testing.sweep.recipes import RECIPES
from hf_optim.toolkit import topology

PASS = {
    "convolutions of q, k and v that transformers joins": ("OlmoHybridForCausalLM", "w4a16"),
    "weights of heads with three dimensions": ("FunnelForMaskedLM", "w4a16"),
    "factors of position embeddings with three dimensions": ("ReformerForMaskedLM", "w4a16"),
    "models inside that initialize themselves": ("xLSTMForCausalLM", "w4a16"),
    "a tokenizer that raises without its files": ("CTRLLMHeadModel", "gptq"),
    "a classifier that reads its decoder": ("BartForSequenceClassification", "gptq"),
    "characters instead of tokens": ("CanineForSequenceClassification", "gptq"),
    "codebooks one after another in the rows": ("MusicgenForCausalLM", "gptq"),
}


@pytest.mark.many
@pytest.mark.parametrize(("name", "recipe"), PASS.values(), ids=PASS)
def test_it_is_compressed_saved_and_loaded(name, recipe, tmp_path, stock):
    result = checks.check_class(name, tmp_path, stock, [recipe])
    assert result.stock == ""
    assert result.recipes == {recipe: ("pass", "")}


@pytest.mark.parametrize("recipe", ["w4a16", "w8a8"])
def test_a_class_whose_quantized_checkpoints_cannot_be_read_is_refused_before_the_work(recipe, tmp_path):
    """transformers 5.24 cannot read quantized checkpoints of DINOv2; 5.17 can."""
    model = checks.build("Dinov2ForImageClassification")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inputs = random_inputs(model, 0)
    refusal = ""
    try:
        model = hf_optim.optimize(model, RECIPES[recipe])
    except ModelError as error:
        refusal = str(error)
    if refusal:
        assert re.search(r"could not load a compressed checkpoint of Dinov2.*--dense", refusal)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        return
    model.save_pretrained(tmp_path)
    stock = type(model).from_pretrained(tmp_path).eval()
    assert torch.equal(checks.outputs(stock, inputs), checks.outputs(model.eval(), inputs))


def test_a_single_expert_is_loaded(tmp_path, stock):
    from transformers import HunYuanMoEV1Config, HunYuanMoEV1ForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    config = HunYuanMoEV1Config(**sizes, num_key_value_heads=2, head_dim=16, vocab_size=64, num_experts=1, moe_topk=1)
    model = HunYuanMoEV1ForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "model")
    batches = [random_inputs(model, 0)]
    outcome = checks.check_recipe(type(model), tmp_path / "model", "w4a16", batches, tmp_path / "out", stock)
    assert outcome == ("pass", "")


def test_the_rows_of_an_example_need_not_be_examples():
    model = checks.build("MusicgenForCausalLM")
    model = hf_optim.optimize(model, RECIPES["gptq"], calibration=[random_inputs(model, 0)])
    assert run_of(model).record.stages[0]["driver"] == "blockwise"


def test_the_decoder_of_a_classifier_reads_as_much_as_its_encoder():
    inputs = topology.dummy_inputs(checks.build("BartForSequenceClassification"))
    assert inputs["decoder_input_ids"].shape == inputs["input_ids"].shape
    inputs = topology.dummy_inputs(checks.build("BartForConditionalGeneration"))
    assert 2 * inputs["decoder_input_ids"].shape[1] == inputs["input_ids"].shape[1]
