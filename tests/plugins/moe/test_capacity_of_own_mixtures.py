"""A capacity on mixtures whose code is saved with the checkpoint: exact, undone by stock transformers, or refused."""

from __future__ import annotations

import copy

import pytest
import torch
from test_codes_of_own_mixtures import MOEFIED, RESIDUAL, TASKS, VISION, inputs_of, mixture
from tiny_models import tiny_llama, tiny_mixtral, tiny_opt, tiny_t5, tiny_vit
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

import hf_optim
from hf_optim import ModelError

BY_TOKEN = {**TASKS, "routing": "token"}
POSITION, PRIORITY = "capacity_routing", "batch_priority_routing"


@pytest.mark.parametrize(
    ("build", "step", "technique", "auto"),
    [
        (tiny_llama, MOEFIED, POSITION, AutoModelForCausalLM),
        (tiny_opt, RESIDUAL, POSITION, AutoModelForCausalLM),
        (tiny_opt, {**RESIDUAL, "gate": "probability"}, PRIORITY, AutoModelForCausalLM),
        (tiny_t5, BY_TOKEN, PRIORITY, AutoModelForSeq2SeqLM),
    ],
)
def test_it_is_exact_where_nothing_is_dropped_and_kept_in_the_checkpoint(build, step, technique, auto, tmp_path):
    model = mixture(build, step)
    inputs = inputs_of(model, step)

    def limited(capacity):
        fields = {"technique": technique, "capacity": capacity, "measure": False}
        return hf_optim.optimize(copy.deepcopy(model), [fields])

    with torch.no_grad():
        expected = model(**inputs).logits
        assert torch.equal(limited(8.0)(**inputs).logits, expected)
        few = limited(0.25)
        found = few(**inputs).logits
        assert not torch.equal(found, expected)
        assert any(load.dropped_share > 0.5 for load in hf_optim.expert_load(few).values())
        few.save_pretrained(tmp_path)
        with_it = auto.from_pretrained(tmp_path, trust_remote_code=True, optim_config="auto")
        torch.testing.assert_close(with_it(**inputs).logits, found, rtol=0, atol=1e-6)
        without = auto.from_pretrained(tmp_path, trust_remote_code=True)
        torch.testing.assert_close(without(**inputs).logits, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("technique", [POSITION, PRIORITY])
@pytest.mark.parametrize(
    ("build", "step", "message"),
    [
        (tiny_vit, VISION, r'has a capacity of its own: change config\.vmoe\["capacity"\]'),
        (tiny_t5, TASKS, "routes by task: all tokens of a sequence choose the same experts"),
    ],
)
def test_classes_that_a_capacity_would_break_are_refused(build, step, message, technique):
    with pytest.raises(ModelError, match=message):
        hf_optim.optimize(mixture(build, step), [{"technique": technique, "measure": False}])


@pytest.mark.parametrize(("build", "step"), [(tiny_llama, MOEFIED), (tiny_opt, RESIDUAL)])
def test_priorities_among_equal_gates_are_refused(build, step):
    with pytest.raises(ModelError, match=r"a gate of 1, so none is larger; use a capacity that goes by"):
        hf_optim.optimize(mixture(build, step), [{"technique": PRIORITY, "measure": False}])


@pytest.mark.parametrize(
    ("fields", "counted"),
    [
        ({"technique": POSITION, "capacity": 0.25, "measure": False}, lambda model: loads(model).chosen),
        ({"technique": "dynamoe"}, lambda model: (buckets(model)["forwards"],)),
    ],
    ids=["capacity", "buckets"],
)
def test_a_stock_mixture_with_attention_of_its_own_is_loaded_with_its_setting(fields, counted, tmp_path, monkeypatch):
    made = hf_optim.optimize(tiny_mixtral(), [{"technique": "strided", "stride": 4}, fields])
    made.save_pretrained(tmp_path)
    # As in a new process: transformers reads the source of a class once, and derived classes inherit what it found.
    for cls in type(made).__mro__:
        if "_can_set_experts_implementation_cached_value" in vars(cls):
            monkeypatch.delattr(cls, "_can_set_experts_implementation_cached_value")
    again = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True, optim_config="auto")
    inputs = inputs_of(made, {})
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, made(**inputs).logits, rtol=0, atol=1e-6)
    assert counted(again) == counted(made)
    assert sum(counted(again)) > 0


def loads(model):
    return next(iter(hf_optim.expert_load(model).values()))


def buckets(model):
    return next(iter(hf_optim.expert_buckets(model).values()))
