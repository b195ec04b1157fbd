"""Techniques that say how ranks exchange tokens: refusals, the checkpoint, one process, record and card."""

from __future__ import annotations

import json
import logging

import pytest
import tiny_mixtures
import torch
from tiny_models import tiny_llama
from transformers import MixtralForCausalLM

import hf_optim
from hf_optim import CheckpointError, ModelError, OptimConfig, RecipeError
from hf_optim.toolkit.experts import Exchange, exchange_of, expert_exchange, stored_exchange
from hf_optim_plugins.moe.hierarchical_all_to_all import HierarchicalAllToAll
from hf_optim_plugins.moe.tutel import Tutel

IDS = torch.arange(3, 23).reshape(2, 10)
ALL = pytest.mark.parametrize("cls", [HierarchicalAllToAll, Tutel])


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"order": "both"}, "order must be one of 'intra_first', 'inter_first', 'flat'"),
        ({"ranks_per_node": 0}, "ranks_per_node must be >= 1"),
        ({"timeout": 0.0}, "timeout must be > 0"),
        ({"timeout": float("inf")}, "timeout must be"),
    ],
)
def test_wrong_fields(fields, text):
    with pytest.raises(RecipeError, match=text):
        HierarchicalAllToAll(**fields)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"parallelism": "pipeline"}, "parallelism must be one of 'auto', 'exchange', 'gather'"),
        ({"degrees": ()}, "degrees must be a list of 1 to 8"),
        ({"degrees": (1, 1)}, "degrees must differ"),
        ({"degrees": (0,)}, "a degree must be an integer from 1"),
        ({"degrees": (65,)}, "a degree must be an integer from 1"),
        ({"trials": 0}, "trials must be >= 1"),
        ({"capacity": float("nan")}, "capacity must be a finite number"),
        ({"capacity": -1e9}, "capacity must be >="),
    ],
)
def test_wrong_fields_of_tutel(fields, text):
    with pytest.raises(RecipeError, match=text):
        Tutel(**fields)


@pytest.mark.parametrize("capacity", [0.5, -0.5])
def test_capacities_of_tutel_drop_alike_with_either_sign_and_in_one_process(capacity, tmp_path):
    model = hf_optim.optimize(tiny_mixtures.build("mixtral"), [Tutel(capacity=capacity)])
    same = {"technique": "capacity_routing", "capacity": 0.5, "rounding": "tutel", "measure": False}
    twin = hf_optim.optimize(tiny_mixtures.build("mixtral"), [same])
    assert torch.equal(logits(model), logits(twin))
    load = hf_optim.expert_load(model)
    assert load == hf_optim.expert_load(twin)
    assert sum(sum(one.dropped) for one in load.values()) > 0
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "hf_optim.json").read_text())["reload"] == "STOCK_ARCH"
    assert "Expert capacity" in (tmp_path / "README.md").read_text()
    auto = MixtralForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert torch.equal(logits(auto), logits(twin))
    with pytest.raises(RecipeError, match="expert capacity"):
        OptimConfig.parse([Tutel(capacity=capacity), same]).check()
    OptimConfig.parse([Tutel(), same]).check()


@ALL
@pytest.mark.parametrize(
    ("build", "text"),
    [
        (tiny_llama, "LlamaForCausalLM has no experts"),
        (lambda: tiny_mixtures.build("nllb-moe"), "only its experts 0 and 1"),
        (lambda: tiny_mixtures.build("dbrx"), "do not run through transformers' interface"),
    ],
    ids=["dense", "nllb", "dbrx"],
)
def test_models_without_experts_on_the_interface(cls, build, text):
    with pytest.raises(ModelError, match=rf"step 1 \({cls.spec.name}\).*{text}"):
        hf_optim.optimize(build(), [cls()])


def test_two_exchanges_in_one_recipe():
    with pytest.raises(RecipeError, match="expert exchange"):
        OptimConfig.parse([HierarchicalAllToAll(), HierarchicalAllToAll(order="flat")]).check()


@ALL
def test_one_process_computes_what_stock_transformers_computes_and_says_so(cls, tmp_path, caplog):
    model = tiny_mixtures.build("mixtral")
    expected = logits(model)
    with caplog.at_level(logging.INFO, logger="hf_optim"):
        done = hf_optim.optimize(model, [cls(ranks_per_node=4)])
    assert "one process holds all experts, so that nothing is exchanged" in caplog.text
    assert torch.equal(logits(done), expected)
    assert expert_exchange(done) == {}
    done.save_pretrained(tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    assert held["hf_optim"]["exchange"]["ranks_per_node"] == 4
    assert held["architectures"] == ["MixtralForCausalLM"]
    assert torch.equal(logits(MixtralForCausalLM.from_pretrained(tmp_path)), expected)
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="hf_optim"):
        auto = MixtralForCausalLM.from_pretrained(tmp_path, optim_config="auto")
    assert "in config.json: one process holds all experts" in caplog.text
    assert torch.equal(logits(auto), expected)
    assert exchange_of(auto) is None
    text = (tmp_path / "README.md").read_text()
    assert "Exchange between ranks" in text
    assert "experts of 2 layers" in text
    steps = json.loads((tmp_path / "hf_optim.json").read_text())["steps"]
    entry = next(iter(steps.values())) if isinstance(steps, dict) else steps[0]
    assert entry["layers"] == 2
    assert entry["layers_over_ranks"] == 0


@pytest.mark.parametrize(
    ("held", "text"),
    [
        ("flat", "must be a mapping with a kind"),
        ({"kind": "ring"}, "kind must be one of"),
        ({"kind": "hierarchical", "order": ["flat"]}, "order must be one of"),
        ({"kind": "hierarchical", "degrees": {"1": 2}}, "degrees must be a list"),
        ({"kind": "hierarchical", "hops": 3}, "unknown field"),
        ({"kind": "hierarchical", "timeout": 1e300}, "timeout must be above 0"),
    ],
)
def test_malformed_settings_in_a_checkpoint(held, text, tmp_path):
    model = tiny_mixtures.build("mixtral")
    model.config.hf_optim = {"exchange": held}
    model.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=text):
        MixtralForCausalLM.from_pretrained(tmp_path, optim_config="auto")


def test_a_capacity_and_an_exchange_are_stored_beside_each_other(tmp_path):
    model = tiny_mixtures.build("mixtral")
    steps = [{"technique": "capacity_routing", "measure": False}, HierarchicalAllToAll(order="inter_first")]
    hf_optim.optimize(model, steps).save_pretrained(tmp_path)
    config = MixtralForCausalLM.from_pretrained(tmp_path).config
    assert set(config.hf_optim) == {"routing", "exchange"}
    assert stored_exchange(config) == Exchange(order="inter_first")
