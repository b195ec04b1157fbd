"""Pruning a mixture: experts lose weights one by one, in one shot and in training; what routes stays."""

from __future__ import annotations

import copy
import logging

import pytest
import tiny_mixtures
import torch
from starved_experts import starve
from tiny_models import tiny_mixtral
from transformers import AutoModelForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim import ModelError, run_of
from hf_optim.runs.masking import stray_weights
from hf_optim.toolkit import topology
from hf_optim.toolkit.pruning import masks

TRAINED = {
    "gmp": {"every": 1},
    "iterative": {"rounds": 2, "dense": False, "sparsity": 0.5},
    "lottery_ticket": {"rounds": 2, "dense": False, "sparsity": 0.5},
    "lr_rewinding": {"rounds": 2, "dense": False, "sparsity": 0.5},
    "sr_ste": {},
    "top_kast": {"sparsity": 0.5, "backward_sparsity": 0.25},
}
STACKS = [f"model.layers.{index}.mlp.experts.{name}" for index in (0, 1) for name in ("gate_up_proj", "down_proj")]


def tokens(rows=8, width=8, seed=3):
    return torch.randint(3, 60, (rows, width), generator=torch.Generator().manual_seed(seed))


def qwen2_moe():
    """Build a mixture with shared experts and their gates, which do not train, and all of whose experts are chosen."""
    sizes = tiny_mixtures.sizes(Qwen2MoeConfig, {"shared_expert_intermediate_size": 32, "num_experts_per_tok": 4})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Qwen2MoeForCausalLM(Qwen2MoeConfig(**sizes)).eval()
    for name, module in model.named_modules():
        if name.endswith("gate"):
            module.requires_grad_(False)
    return model


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


def train(model, folder, stop=None, resume=None):
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        learning_rate=1e-2,
        weight_decay=0.01,
        per_device_train_batch_size=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_strategy="no",
        save_strategy="steps" if stop or resume else "no",
    )
    rows = [{"input_ids": row, "labels": row} for row in tokens()]
    callbacks = [StopAt(stop)] if stop else []
    trainer = hf_optim.OptimTrainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks)
    if stop:
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    else:
        trainer.train(resume_from_checkpoint=resume)
    return model


@pytest.mark.many
@pytest.mark.parametrize("name", TRAINED)
def test_training_prunes_each_expert_and_leaves_what_routes(name, tmp_path):
    model = qwen2_moe()
    routing = {key: value.clone() for key, value in model.state_dict().items() if "gate.weight" in key}
    assert len(routing) == 4
    model = train(hf_optim.optimize(model, {"technique": name, **TRAINED[name]}), tmp_path / "training")
    run, views = run_of(model), topology.expert_linears(model)
    covered, skipped = run.covered(run.recipe.steps[0])
    assert views.keys() <= covered
    assert not skipped
    assert {int((view.weight == 0).sum()) * 2 - view.weight.numel() for view in views.values()} == {0}
    assert set(STACKS) <= set(run.masks)
    assert not stray_weights(run)
    assert {run.masks[stack].dim() for stack in STACKS} == {3}
    assert all(torch.equal(model.state_dict()[key], value) for key, value in routing.items())
    assert not {key for key in run.masks if "gate.weight" in key}
    entry = run.record.steps["0"]
    assert {name: entry["layers"][name] for name in views} == dict.fromkeys(views, 0.5)
    if name == "sr_ste":
        assert all(run.nm_patterns[stack] == (2, 4) for stack in STACKS)
        assert all(masks.has_nm_pattern(view.weight, 2, 4) for view in views.values())
    model.save_pretrained(tmp_path / "saved")  # one matrix for each expert, which loading joins
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.many(every=4)
@pytest.mark.parametrize("name", ["gmp", "sr_ste"])
def test_a_resumed_training_ends_with_the_same_experts(name, tmp_path):
    def fresh():
        # Masks that do not follow from the weights alone must be in the checkpoint.
        fields = {**TRAINED[name], **({"every": 2} if name == "sr_ste" else {})}
        return hf_optim.optimize(tiny_mixtral(), {"technique": name, **fields})

    undisturbed = train(fresh(), tmp_path / "a").state_dict()
    train(fresh(), tmp_path / "b", stop=3)
    resumed = train(fresh(), tmp_path / "b", resume=str(tmp_path / "b" / "checkpoint-2"))
    assert all(torch.equal(value, undisturbed[key]) for key, value in resumed.state_dict().items())
    assert bool((undisturbed[STACKS[0]] == 0).any())


@pytest.mark.parametrize("name", ["l0", "variational_dropout"])
def test_noise_leaves_experts_and_says_so(name, tmp_path, caplog):
    model = hf_optim.optimize(tiny_mixtral(), {"technique": name, "sparsity": 0.5})
    with caplog.at_level(logging.WARNING, logger="hf_optim"):
        train(model, tmp_path)
    run = run_of(model)
    ((reason, left),) = run.covered(run.recipe.steps[0])[1].items()
    assert reason.startswith("noise is learned in the forward of linear layers, and these experts are stacked matrices")
    assert left == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}
    assert f"step 1 ({name}) skipped 2 modules ({reason})" in caplog.text
    entry = run.record.coverage[f"step 1 ({name})"]["left_alone"]
    assert entry[f"experts: {reason}"]["weights"] == sum(model.get_parameter(stack).numel() for stack in STACKS)
    assert not set(STACKS) & set(run.masks)
    with pytest.raises(ModelError, match=r"noise is learned|which this technique does not work on"):
        hf_optim.optimize(tiny_mixtral(), {"technique": name, "targets": ["*.experts.*"]})
    hf_optim.optimize(tiny_mixtral(), {"technique": name, "skip": ["*.experts.*"]})


def test_structured_leaves_experts_and_says_so():
    model = hf_optim.optimize(tiny_mixtral(), {"technique": "structured", "heads": 0.5, "score": "magnitude"})
    run = run_of(model)
    ((reason, left),) = run.covered(run.recipe.steps[0])[1].items()
    assert reason.startswith("neither whole experts nor neurons inside of experts are removed")
    assert left == {"model.layers.0.mlp.experts", "model.layers.1.mlp.experts"}


# -- scores of activations ---------------------------------------------------------------------------------------------
def inputs_of(model, data):
    """Return the tokens that reach each expert of the first block, and its inputs, recomputed with plain products."""
    experts, seen = model.get_submodule("model.layers.0.mlp.experts"), []
    handle = experts.register_forward_pre_hook(lambda module, args: seen.append(args[:2]))
    with torch.no_grad():
        model(data)
    handle.remove()
    hidden, chosen = (torch.cat([call[i].flatten(0, -2) for call in seen]) for i in (0, 1))
    found = {}
    for index in range(experts.num_experts):
        rows = hidden[(chosen == index).any(-1)]
        gate, up = (rows @ experts.gate_up_proj[index].T).chunk(2, -1)
        everywhere = (hidden @ experts.gate_up_proj[index].T).chunk(2, -1)
        found[index, "gate_up_proj"] = rows, hidden
        found[index, "down_proj"] = experts.act_fn(gate) * up, experts.act_fn(everywhere[0]) * everywhere[1]
    return {key: (own.detach().double(), every.detach().double()) for key, (own, every) in found.items()}


@pytest.mark.parametrize("step", [{"technique": "nm"}, {"technique": "magnitude", "scope": "row"}], ids=["nm", "wanda"])
def test_the_norms_are_those_of_the_tokens_of_the_expert(step, caplog):
    model, data = tiny_mixtral(), tokens(5, 16)
    starve(model.get_submodule("model.layers.0.mlp.gate"), 2)
    inputs = inputs_of(model, data)
    dense = copy.deepcopy(model)
    views = topology.expert_linears(dense)
    recipe = {"steps": [{**step, "score": "activation"}], "driver": "whole_model"}
    with caplog.at_level(logging.WARNING, logger="hf_optim"):
        model = hf_optim.optimize(model, recipe, calibration=data)
    scarce, after = run_of(model).record.steps["0"]["experts_with_few_tokens"], topology.expert_linears(model)
    counts = {index: len(own) for (index, _), (own, _) in inputs.items()}
    assert counts[2] == 0
    assert any(32 <= count < 48 for count in counts.values())  # enough for one matrix, few for the other
    checked = set()
    for (index, parameter), (own, every) in inputs.items():
        name = f"model.layers.0.mlp.experts.{index}.{parameter}"
        squares, width = own.square().sum(0), own.shape[1]
        if len(own) < width:
            assert scarce[name] == len(own)
            squares = squares + (width - len(own)) / len(every) * every.square().sum(0)
        else:
            assert name not in scarce
        score = views[name].weight.double().abs() * squares.sqrt()
        groups = score.view(len(score), -1, 4) if step["technique"] == "nm" else score
        kept = torch.zeros_like(groups, dtype=torch.bool)
        kept = kept.scatter(-1, groups.topk(groups.shape[-1] // 2).indices, True).view_as(score)
        same = (after[name].weight != 0) == kept
        assert float(same.double().mean()) > 0.999  # scores are computed in float32
        checked.add(len(own) < width)
    assert checked == {True, False}
    assert "matrices of experts saw fewer tokens than they have inputs" in caplog.text


def test_compensation_refits_experts_and_a_budget_chooses_among_them():
    data, step = tokens(16, 16), {"technique": "nm", "score": "obs", "compensate": True}
    model = hf_optim.optimize(tiny_mixtral(), step, calibration=data)
    dense = topology.expert_linears(tiny_mixtral())
    for name, view in topology.expert_linears(model).items():
        assert masks.has_nm_pattern(view.weight, 2, 4)
        kept = view.weight != 0
        assert not torch.equal(view.weight[kept], dense[name].weight[kept])
    budget = {"technique": "nm", "budget": 0.5, "sensitivity": "layer"}
    model = hf_optim.optimize(tiny_mixtral(), budget, calibration=data)
    run = run_of(model)
    covered, skipped = run.covered(run.recipe.steps[0])
    assert {name for name in covered | skipped["too sensitive for the budget"] if "experts" in name} == dense.keys()
    pruned = sum(topology.coverage(model, [name]).covered for name in covered)
    assert 0.4 < pruned / 43008 <= 0.5


def test_a_global_ranking_spans_layers_and_experts():
    model = tiny_mixtral()
    with torch.no_grad():
        model.get_parameter(STACKS[1])[2] *= 0.01
    model = hf_optim.optimize(model, {"technique": "magnitude", "scope": "global", "sparsity": 0.5})
    views = topology.expert_linears(model)
    assert not views["model.layers.0.mlp.experts.2.down_proj"].weight.any()
    shares = {round(float((view.weight == 0).float().mean()), 3) for view in views.values()}
    assert len(shares) > 4
    total = sum(mask.numel() for mask in run_of(model).masks.values())
    assert sum(int((~mask).sum()) for mask in run_of(model).masks.values()) == masks.removed_count(total, 0.5)


def test_targets_choose_single_experts():
    step = {"technique": "nm", "targets": ["*.experts.1.*"], "skip": ["*.layers.1.*"]}
    model = hf_optim.optimize(tiny_mixtral(), step)
    run = run_of(model)
    names = {f"model.layers.0.mlp.experts.1.{name}" for name in ("gate_up_proj", "down_proj")}
    assert run.covered(run.recipe.steps[0])[0] == names
    assert not run.nm_patterns  # the other experts of the stack are dense
    for name, view in topology.expert_linears(model).items():
        assert bool((view.weight == 0).any()) == (name in names)
    weights = sum(topology.expert_linears(model)[name].weight.numel() for name in names)
    assert run.record.coverage["step 1 (nm)"]["weights_touched"] == weights
