"""``offload``: a choice of the machine, which changes no weight; its record and card, and what it refuses."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from transformers import AutoModelForCausalLM

import hf_optim
from hf_optim import OptimConfig, RecipeError, run_of
from hf_optim.testing.tiny_runs import inputs_for
from hf_optim.toolkit.offloading import find_state

STEP = {"technique": "offload", "to": "disk", "threads": 2}


def test_record_and_card_have_the_plan(tmp_path):
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=4), STEP)
    plan = hf_optim.offload_plan(model)
    entry = run_of(model).record.steps["0"]
    assert entry["blocks"] == {"device": 0, "host": 0, "disk": 4}
    assert entry["bytes"]["moved_by_each_pass"] == plan.streamed_bytes == sum(plan.sizes)
    model.save_pretrained(tmp_path)
    text = " ".join((tmp_path / "README.md").read_text().split())
    assert f"A pass over the model moved {plan.streamed_bytes} bytes" in text
    assert "where it is loaded, it is not offloaded" in text
    assert "Memory and times in the results, where there are any, are those of the whole model on its device." in text
    assert json.loads((tmp_path / "hf_optim.json").read_text())["reload"] == "STOCK_DENSE"
    for settings in ({}, {"optim_config": "auto"}):
        assert find_state(AutoModelForCausalLM.from_pretrained(tmp_path, **settings)) is None


def test_a_class_whose_forward_takes_an_argument_of_its_own_is_offloaded():
    recipe = [{"technique": "transformer_xl", "segment": 3, "memory": 4}]
    expected, model = hf_optim.optimize(tiny_llama(), recipe), hf_optim.optimize(tiny_llama(), [*recipe, STEP])
    with torch.no_grad():
        inputs = inputs_for(model)
        assert torch.equal(model(**inputs).logits, expected(**inputs).logits)


def test_a_restored_model_is_saved_with_its_record(tmp_path):
    model = hf_optim.optimize(tiny_llama(), STEP)
    hf_optim.restore(model).save_pretrained(tmp_path)
    assert (tmp_path / "hf_optim.json").exists()
    with torch.no_grad():
        inputs = inputs_for(model)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(stock(**inputs).logits, tiny_llama()(**inputs).logits)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"to": "tape"}, r"offload: to must be one of 'cpu', 'disk'"),
        ({"device_memory": "4GX"}, r"offload: device_memory: '4GX' is not a size"),
        ({"host_memory": -1}, r"offload: host_memory: -1 is less than nothing"),
        ({"ahead": 0}, r"offload: ahead must be >= 1"),
        ({"folder": "/tmp"}, r"offload: folder is for to: disk"),
        ({"devise_memory": 1}, r"did you mean 'device_memory'"),
    ],
)
def test_wrong_fields_are_refused(fields, reason):
    with pytest.raises(RecipeError, match=reason):
        OptimConfig.parse([{"technique": "offload", **fields}])
