"""``dynamoe``: refusals, wrong fields, the record, and two steps that own the same."""

from __future__ import annotations

import json

import pytest
import tiny_mixtures
import torch
from capped_oracle import is_registered, without_other_users
from tiny_models import tiny_llama

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError
from hf_optim_plugins.moe.dynamoe import DynaMoE

IDS = torch.arange(3, 23).reshape(2, 10)


@pytest.fixture(autouse=True)
def alone():
    with without_other_users():
        yield


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"rule": "primes"}, "rule must be one of 'power', '64'"),
        ({"deviations": -1.0}, "deviations must be >= 0"),
        ({"window": 4, "trigger": 5}, "trigger must be at most window"),
        ({"slack": 0.5}, "slack must be >= 1"),
        ({"graphs": 0}, "graphs must be >= 1"),
        ({"stable": -1}, "stable must be >= 0"),
    ],
)
def test_wrong_fields(fields, text):
    with pytest.raises(RecipeError, match=text):
        DynaMoE(**fields)


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (tiny_llama, "LlamaForCausalLM has no experts"),
        (lambda: tiny_mixtures.build("nllb-moe"), "only its experts 0 and 1"),
        (lambda: tiny_mixtures.build("dbrx"), "do not run through transformers' interface"),
    ],
    ids=["dense", "nllb", "dbrx"],
)
def test_models_without_experts_on_the_interface(build, text):
    with pytest.raises(ModelError, match=rf"step 1 \(dynamoe\).*{text}"):
        hf_optim.optimize(build(), [DynaMoE()])
    assert not is_registered()


def test_two_of_them_in_one_recipe():
    with pytest.raises(RecipeError, match="expert buckets"):
        OptimConfig.parse([DynaMoE(), DynaMoE(rule="64")]).check()


def test_beside_a_capacity_only_what_is_kept_fills_buffers(tmp_path):
    capacity = {"technique": "capacity_routing", "capacity": 0.5, "measure": False}
    model = hf_optim.optimize(tiny_mixtures.build("mixtral"), [capacity, DynaMoE()])
    twin = hf_optim.optimize(tiny_mixtures.build("mixtral"), [capacity])
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(model(input_ids=IDS).logits, twin(input_ids=IDS).logits)
    dropped = [sum(load.dropped) for load in hf_optim.expert_load(model).values()]
    for entry, lost in zip(hf_optim.expert_buckets(model).values(), dropped, strict=True):
        assert entry["pairs"] == 2 * IDS.numel() - lost / 2
    model.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / "config.json").read_text())["hf_optim"]) == {"routing", "buckets"}


def test_upcycled_experts_get_buckets():
    steps = [{"technique": "upcycle", "experts": 4, "top_k": 2}, DynaMoE()]
    model = hf_optim.optimize(tiny_llama(), steps)
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(hf_optim.expert_buckets(model)) == model.config.num_hidden_layers
