"""Recipes on mixtures of experts: each step keeps the effects of those before it, and adapters train on the result."""

from __future__ import annotations

import logging

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from starved_experts import starve
from tiny_models import tiny_llama, tiny_mixtral
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import OptimError, run_of
from hf_optim.recipes.traits import MOE, QUANTIZED, SPARSE_NM
from hf_optim.runs.masking import stray_weights
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning.masks import has_nm_pattern, nm_mask
from hf_optim.toolkit.statistics import TokenSample
from hf_optim.training import keep_masks

UPCYCLE = {"technique": "upcycle", "experts": 4, "top_k": 2}
GPTQ = {"technique": "gptq", "bits": 4, "group_size": 16}
GATES = [f"model.layers.{index}.mlp.gate.weight" for index in (0, 1)]


def tokens(rows=8, width=8, seed=3):
    return torch.randint(3, 60, (rows, width), generator=torch.Generator().manual_seed(seed))


def rows_of(data):
    return [{"input_ids": row, "labels": row} for row in data]


def trainer_of(model, folder, cls=Trainer, steps=3, rate=3e-2, **settings):
    arguments = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=rate,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        logging_strategy="no",
        seed=0,
    )
    return cls(model=model, args=arguments, train_dataset=rows_of(tokens()), **settings)


def logits(model, data=None):
    with torch.no_grad():
        return model.eval()(tokens() if data is None else data).logits


def zeros_of(model):
    return {name: view.weight == 0 for name, view in topology.expert_linears(model).items()}


# -- upcycling and what follows ----------------------------------------------------------------------------------------
def test_an_upcycled_model_learns_from_the_model_it_was(tmp_path):
    teacher = tiny_llama()
    distill = {"technique": "logit_kd", "alpha": 1.0, "teacher": "self"}
    model = hf_optim.optimize(tiny_llama(), [{**UPCYCLE, "noise": 0.5}, distill])
    expected = logits(teacher).log_softmax(-1)

    def distance():
        return float((expected.exp() * (expected - logits(model).log_softmax(-1))).sum(-1).mean())

    before = distance()
    assert before > 1e-3  # half of each expert was drawn anew
    trainer_of(model, tmp_path, hf_optim.OptimTrainer, steps=8, rate=3e-3).train()
    run = run_of(model)
    assert run.finished
    assert MOE in run.traits
    assert distance() < 0.7 * before
    stacks = topology.expert_linears(model)
    assert not torch.equal(
        stacks["model.layers.0.mlp.experts.0.down_proj"].weight, stacks["model.layers.0.mlp.experts.1.down_proj"].weight
    )
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert type(loaded).__name__ == "MixtralForCausalLM"
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("between", [[], [{"technique": "nm"}]], ids=["upcycle", "upcycle, nm"])
def test_upcycled_experts_with_few_tokens_and_none_are_quantized(between, tmp_path, caplog):
    first = hf_optim.optimize(tiny_llama(), UPCYCLE)
    first.save_pretrained(tmp_path / "mixture")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "mixture")
    starve(model.get_submodule("model.layers.0.mlp.gate"), 1)
    dense = {name: view.weight.clone() for name, view in topology.expert_linears(model).items()}
    data = tokens(4, 16)
    with caplog.at_level(logging.WARNING, logger="hf_optim"):
        model = hf_optim.optimize(model, [*between, GPTQ], calibration=data)
    run, views = run_of(model), topology.expert_linears(model)
    few = run.reported(run.recipe.steps[-1])["experts_with_few_tokens"]
    unused = [f"model.layers.0.mlp.experts.1.{name}" for name in ("gate_up_proj", "down_proj")]
    assert [few[name] for name in unused] == [0, 0]
    assert any(count > 0 for count in few.values())
    assert f"{unused[0]} (0)" in caplog.text
    assert holds(QUANTIZED, run)
    if between:
        assert {SPARSE_NM} <= run.traits
        assert holds(SPARSE_NM, run)
        for name, view in views.items():
            assert torch.equal(view.weight == 0, ~nm_mask(dense[name], 2, 4) | (view.weight == 0))
            assert has_nm_pattern(view.weight, 2, 4)
        assert not stray_weights(run)
    else:
        # On tokens of its layer, an expert that saw none is better than rounded to nearest.
        rounded = topology.expert_linears(hf_optim.optimize(first, {**GPTQ, "technique": "rtn"}))
        with TokenSample({name: views[name] for name in unused}) as sample:
            logits(model, data)
        inputs, name = sample["model.layers.0.mlp.experts"], unused[0]
        errors = [float((inputs @ (found[name].weight - dense[name]).T).square().sum()) for found in (views, rounded)]
        assert errors[0] < errors[1]
    model.save_pretrained(tmp_path / "quantized")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    starve(loaded.get_submodule("model.layers.0.mlp.gate"), 1)
    assert torch.equal(logits(loaded, data), logits(model, data))


def test_masks_of_a_dense_model_become_those_of_its_experts():
    model = hf_optim.optimize(tiny_llama(), [{"technique": "nm"}, UPCYCLE, GPTQ], calibration=tokens(16, 16))
    run = run_of(model)
    views = topology.expert_linears(model)
    assert all(has_nm_pattern(view.weight, 2, 4) for view in views.values())
    assert {view.parameter_name for view in views.values()} <= set(run.nm_patterns)
    assert views.keys() <= set(run.record.steps["0"]["layers"])
    assert not stray_weights(run)


# -- permutation -------------------------------------------------------------------------------------------------------
def test_a_permutation_for_2of4_is_exact_and_counts_the_experts():
    permute = {"technique": "channel_permutation", "tries": 0, "starts": 8}
    reference = logits(tiny_mixtral())
    model = hf_optim.optimize(tiny_mixtral(), permute)
    torch.testing.assert_close(logits(model), reference, atol=1e-5, rtol=1e-4)
    figures = run_of(model).record.steps["0"]
    experts = {name for name in figures["kept_after_by_layer"] if "experts" in name}
    assert len(experts) == 8
    kept = [
        sum(
            float((view.weight.abs() * nm_mask(view.weight, 2, 4)).sum())
            for view in topology.expert_linears(one).values()
        )
        for one in (tiny_mixtral(), model)
    ]
    assert kept[1] > kept[0]
    pruned = hf_optim.optimize(tiny_mixtral(), [permute, {"technique": "nm"}])
    for name, view in topology.expert_linears(pruned).items():
        assert torch.equal(
            view.weight,
            topology.expert_linears(model)[name].weight * nm_mask(topology.expert_linears(model)[name].weight, 2, 4),
        )


# -- adapters ----------------------------------------------------------------------------------------------------------
def adapted(model):
    settings = {"r": 2, "lora_dropout": 0.0, "target_modules": []}
    return get_peft_model(
        model, LoraConfig(target_parameters=["experts.gate_up_proj", "experts.down_proj"], **settings)
    )


def after_recipe(home):
    return hf_optim.optimize(tiny_mixtral(), {"technique": "nm"})


def accelerated(home):
    return hf_optim.accelerate(after_recipe(home))


def automatic(home):
    after_recipe(home).save_pretrained(home)
    return AutoModelForCausalLM.from_pretrained(home, optim_config="auto")


def with_a_capacity(home):
    steps = [{"technique": "nm"}, {"technique": "capacity_routing", "capacity": 2.0, "measure": False}]
    return hf_optim.optimize(tiny_mixtral(), steps)


@pytest.mark.many(every=4)
@pytest.mark.filterwarnings("ignore:these layers run on dense kernels")  # no kernel for 2:4 runs on a CPU
@pytest.mark.parametrize(
    "make", [after_recipe, accelerated, automatic, with_a_capacity], ids=lambda make: make.__name__
)
def test_adapters_on_experts_train_and_load(make, tmp_path):
    model = make(tmp_path / "base")
    zeros, before = zeros_of(model), logits(model)
    assert all(bool(mask.any()) for mask in zeros.values())
    found = adapted(model)
    torch.testing.assert_close(logits(found), before)
    callbacks = hf_optim.callbacks(model) if make is not automatic else []
    trainer_of(found, tmp_path / "training", callbacks=callbacks).train()
    trained = logits(found)
    assert float((trained - before).abs().max()) > 1e-3
    found.save_pretrained(tmp_path / "adapter")
    fresh = PeftModel.from_pretrained(make(tmp_path / "base"), tmp_path / "adapter")
    torch.testing.assert_close(logits(fresh), trained)
    inner = found.unload()
    assert all(torch.equal(mask, zeros[name]) for name, mask in zeros_of(inner).items())
    torch.testing.assert_close(logits(inner), before)


def test_adapters_on_experts_merge_under_the_masks(tmp_path, caplog):
    found = adapted(after_recipe(None))
    with pytest.raises(OptimError, match=r"experts\.down_proj: an adapter on stacked experts .* cannot be held"):
        keep_masks(found)
    trainer_of(found, tmp_path, callbacks=hf_optim.callbacks(found)).train()
    with caplog.at_level(logging.WARNING, logger="hf_optim"):
        model = hf_optim.merge_adapters(found)
    assert not stray_weights(run_of(model))
    changed = topology.expert_linears(model)
    assert all(has_nm_pattern(view.weight, 2, 4) for view in changed.values())
    dense = topology.expert_linears(after_recipe(None))
    assert all(not torch.equal(view.weight, dense[name].weight) for name, view in changed.items())
    (note,) = run_of(model).record.notes
    assert note.endswith("of their update (squared) was outside the masks and is dropped")
    assert "keep_masks" not in caplog.text  # which cannot hold these
