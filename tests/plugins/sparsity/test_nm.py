"""N:M sparsity: the pattern on every family, scores, refitting, budgets, and their effect on a real model."""

from __future__ import annotations

import math

import pytest
import torch
from real_stories import mean_loss, windows
from tiny_models import TINY, tiny_gpt2, tiny_llama
from transformers import Trainer, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.topology.experts import expert_linears
from hf_optim.toolkit.topology.linear_layers import linears, weight_out_in


def tokens(count=6, width=16, seed=3):
    return torch.randint(3, 64, (count, width), generator=torch.Generator().manual_seed(seed))


def touched(model):
    return run_of(model).covered(run_of(model).recipe.steps[-1])


def inputs_of(model, data):
    """Layer name -> its inputs [tokens, in] in float64, for the linear layers of ``model``."""
    found = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, name=name: found.update({name: args[0].flatten(0, -2).double()})
        )
        for name, layer in linears(model).items()
    ]
    with torch.no_grad():
        model(data)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.many
@pytest.mark.parametrize("family", TINY)
@pytest.mark.parametrize(("keep", "group"), [(2, 4), (1, 8)])
def test_every_layer_follows_the_pattern_along_its_input(family, keep, group):
    model = TINY[family]()
    layers = {**linears(model), **expert_linears(model)}
    dense = {name: weight_out_in(layer).detach().clone() for name, layer in layers.items()}
    model = hf_optim.optimize(model, {"technique": "nm", "keep": keep, "group": group})
    run = run_of(model)
    names, skipped = touched(model)
    assert skipped == {}
    assert expert_linears(model).keys() <= names
    for name in names:
        weight, parameter = (
            weight_out_in(layers[name]).detach(),
            getattr(layers[name], "parameter_name", f"{name}.weight"),
        )
        mask = masks.nm_mask(dense[name], keep, group)
        assert torch.equal(weight, dense[name] * mask)
        assert int((weight != 0).sum()) == weight.numel() * keep // group
        assert run.nm_patterns[parameter] == (keep, group)
        assert run.masks[parameter].shape == model.get_parameter(parameter).shape
    for name in dense.keys() - names:
        assert torch.equal(weight_out_in(layers[name]), dense[name])
    assert {SPARSE, SPARSE_NM} <= run.traits
    assert holds(SPARSE, run)


def test_activation_score_is_wandas():
    model, data = tiny_llama(), tokens()
    inputs = inputs_of(model, data)
    dense = {name: layer.weight.detach().clone() for name, layer in linears(model).items()}
    steps = [{"technique": "nm", "score": "activation"}]
    model = hf_optim.optimize(model, {"steps": steps, "driver": "whole_model"}, calibration=data)
    differs = 0
    for name in touched(model)[0]:
        score = dense[name].double().abs() * inputs[name].norm(dim=0)
        mask = masks.nm_mask(score, 2, 4)
        assert torch.equal(model.get_submodule(name).weight, dense[name] * mask)
        differs += int((mask != masks.nm_mask(dense[name], 2, 4)).sum())
    assert differs > 0


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_compensation_is_the_least_squares_fit_of_each_layer(build):
    model, data = build(), tokens(24)
    inputs = inputs_of(model, data)
    dense = {name: weight_out_in(layer).detach().double() for name, layer in linears(model).items()}
    recipe = {"steps": [{"technique": "nm", "compensate": True}], "driver": "whole_model"}
    model = hf_optim.optimize(model, recipe, calibration=data)
    for name in touched(model)[0]:
        weight = weight_out_in(model.get_submodule(name)).detach()
        assert masks.has_nm_pattern(weight, 2, 4)
        mask = masks.nm_mask(dense[name], 2, 4)
        moment = inputs[name].T @ inputs[name]
        moment += 0.01 * moment.diagonal().mean() * torch.eye(len(moment))
        # Normal equations of the fixed mask: the residual's gradient vanishes where weights were kept.
        gradient = ((weight.double() - dense[name]) @ moment)[mask]
        scale = ((dense[name] * ~mask) @ moment)[mask].abs().max()
        assert gradient.abs().max() < 1e-3 * scale
        plain = (inputs[name] @ (dense[name] * ~mask).T).square().sum()
        assert (inputs[name] @ (weight.double() - dense[name]).T).square().sum() < plain


@pytest.mark.parametrize(("keep", "group"), [(6, 8), (4, 8), (1, 4)])
def test_other_patterns_are_exact_compose_and_persist_in_training(keep, group, tmp_path):
    """The ``keep`` largest of each group stay, counted by sorting; refitting and training change nothing else."""
    dense = {name: layer.weight.detach().clone() for name, layer in linears(tiny_llama()).items()}
    step = {"technique": "nm", "keep": keep, "group": group}
    model = hf_optim.optimize(tiny_llama(), step)
    for name in touched(model)[0]:
        groups = dense[name].abs().unflatten(-1, (-1, group))
        least = groups.sort(-1, descending=True).values[..., keep - 1 : keep]
        assert torch.equal(model.get_submodule(name).weight != 0, (groups >= least).flatten(-2))
    quantized = [{**step, "compensate": True}, {"technique": "gptq", "bits": 4, "group_size": 16}]
    model = hf_optim.optimize(tiny_llama(), quantized, calibration=tokens(24))
    assert all(holds(trait, run_of(model)) for trait in run_of(model).traits)
    assert set(run_of(model).nm_patterns.values()) == {(keep, group)}
    model = hf_optim.optimize(tiny_llama(), step)
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, learning_rate=1e-2, weight_decay=0.1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    Trainer(model=model, args=settings, train_dataset=data, callbacks=hf_optim.callbacks(model)).train()
    assert holds(SPARSE_NM, run_of(model))


def test_a_budget_may_hold_across_the_model():
    """The dense layers are those with the largest error per weight anywhere, in a blockwise recipe too."""
    model = tiny_llama()
    with torch.no_grad():
        for parameter in model.model.layers[0].parameters():
            parameter.mul_(1.5)  # the first block matters more
    step = {"technique": "nm", "budget": 0.5, "scope": "model", "sensitivity": "layer"}
    model = hf_optim.optimize(model, {"steps": [step], "driver": "blockwise"}, calibration=tokens())
    names, _ = touched(model)
    sizes = {name: layer.weight.numel() for name, layer in linears(model).items() if name != "lm_head"}
    errors = run_of(model).record.steps["0"]["errors"]
    assert errors.keys() == sizes.keys()
    room, expected = 0.5 * sum(sizes.values()), set()
    for name in sorted(sizes, key=lambda name: errors[name] / sizes[name]):
        if sizes[name] <= room:
            expected.add(name)
            room -= sizes[name]
    assert names == expected
    shares = [sum(sizes[n] for n in names if n.startswith(f"model.layers.{i}.")) for i in (0, 1)]
    assert shares[0] != shares[1]


@pytest.mark.parametrize("driver", ["whole_model", "blockwise"])
@pytest.mark.parametrize("sensitivity", ["layer", "model"])
def test_a_budget_leaves_the_sensitive_layers_dense(driver, sensitivity):
    step = {"technique": "nm", "budget": 0.6, "sensitivity": sensitivity}
    model = hf_optim.optimize(tiny_llama(), {"steps": [step], "driver": driver}, calibration=tokens())
    run = run_of(model)
    names, skipped = touched(model)
    sizes = {name: layer.weight.numel() for name, layer in linears(model).items() if name != "lm_head"}
    errors = run.record.steps["0"]["errors"]
    left = skipped["too sensitive for the budget"]
    assert names | left == set(sizes) == set(errors)
    assert 0.4 < sum(sizes[name] for name in names) / sum(sizes.values()) <= 0.6
    assert all(error > 0 for error in errors.values())
    blocks = ["model.layers.0.", "model.layers.1."] if driver == "blockwise" else ["model."]
    for block in blocks:
        worst = max(errors[name] / sizes[name] for name in names if name.startswith(block))
        room = 0.6 * sum(size for name, size in sizes.items() if name.startswith(block))
        room -= sum(sizes[name] for name in names if name.startswith(block))
        for name in left:
            if name.startswith(block):
                assert errors[name] / sizes[name] >= worst or sizes[name] > room
                assert bool(model.get_submodule(name).weight.all())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_layer_sensitivity_is_the_error_of_the_output():
    model, data = tiny_llama(), tokens()
    inputs = inputs_of(model, data)
    dense = {name: layer.weight.detach().double() for name, layer in linears(model).items()}
    recipe = {"steps": [{"technique": "nm", "budget": 1.0, "sensitivity": "layer"}], "driver": "whole_model"}
    model = hf_optim.optimize(model, recipe, calibration=data)
    for name, error in run_of(model).record.steps["0"]["errors"].items():
        removed = dense[name] * ~masks.nm_mask(dense[name], 2, 4)
        expected = (inputs[name] @ removed.T).square().sum() / (inputs[name] @ dense[name].T).square().sum()
        assert error == pytest.approx(float(expected), rel=1e-4)


def test_widths_that_do_not_divide_are_listed():
    model = hf_optim.optimize(tiny_llama(intermediate_size=46), "nm")
    names, skipped = touched(model)
    assert skipped == {
        "input width 46 is not a multiple of 4": {f"model.layers.{i}.mlp.down_proj" for i in (0, 1)},
    }
    assert len(names) == 12
    with pytest.raises(ModelError, match=r"step 1 \(nm\).*down_proj.*input width 46 is not a multiple of 4"):
        hf_optim.optimize(tiny_llama(intermediate_size=46), {"technique": "nm", "targets": ["*.down_proj"]})


def test_existing_zeros_stay_and_the_tighter_pattern_is_recorded():
    steps = [{"technique": "magnitude", "sparsity": 0.6}, {"technique": "nm"}]
    model = hf_optim.optimize(tiny_llama(), steps)
    once = hf_optim.optimize(tiny_llama(), steps[:1])
    for name, mask in run_of(model).masks.items():
        assert not (mask & ~run_of(once).masks[name]).any()
        assert masks.parameter_has_nm_pattern(model, name, 2, 4)
    model = hf_optim.optimize(tiny_llama(), [{"technique": "nm", "keep": 1}, {"technique": "nm"}])
    assert set(run_of(model).nm_patterns.values()) == {(1, 4)}
    assert holds(SPARSE_NM, run_of(model))


def test_the_pattern_is_kept_in_training(tmp_path):
    model = hf_optim.optimize(tiny_gpt2(), "nm")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    settings = TrainingArguments(
        output_dir=str(tmp_path), max_steps=4, use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no",
        dataloader_pin_memory=False, learning_rate=1e-2, weight_decay=0.1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in tokens(16)]
    Trainer(model=model, args=settings, train_dataset=data, callbacks=hf_optim.callbacks(model)).train()
    for name, pattern in run_of(model).nm_patterns.items():
        assert not torch.equal(model.get_parameter(name), before[name])
        assert masks.parameter_has_nm_pattern(model, name, *pattern)
        assert not model.get_parameter(name)[~run_of(model).masks[name]].any()


def test_data_is_required_only_if_needed():
    for fields, needed in (
        ({}, False),
        ({"score": "activation"}, True),
        ({"compensate": True}, True),
        ({"budget": 0.5}, True),
    ):
        (step,) = OptimConfig.parse([{"technique": "nm", **fields}]).steps
        assert step.needs_data() is needed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keep": 5}, "keep must be < group"),
        ({"keep": 4}, "nm: keep must be < group, not 4 of 4: that removes nothing"),
        ({"budget": 0.0}, "budget must be > 0"),
        ({"scope": "model"}, "scope applies to a budget"),
        ({"score": "act"}, "one of 'magnitude', 'activation'"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "nm", **fields}])


class Pages:
    """A model card that records its calls."""

    def __init__(self):
        self.paragraphs, self.tables = {}, {}

    def paragraph(self, title, markdown):
        self.paragraphs[title] = markdown

    def when(self, sentence, **conditions):
        return f" {sentence}"

    def table(self, title, header, rows):
        self.tables[title] = (header, rows)


def test_the_card_names_pattern_and_skipped_layers(tmp_path):
    model = hf_optim.optimize(tiny_llama(intermediate_size=46), "nm")
    card = Pages()
    run_of(model).recipe.steps[0].export(run_of(model), tmp_path, card)
    (text,), ((_, rows),) = card.paragraphs.values(), card.tables.values()
    assert "12 linear layers keep at most 2 of every 4" in text
    assert "input width 46 is not a multiple of 4): 2 layers" in text
    assert ["model.layers.*.mlp.up_proj", "2", "2,944", "50.0 %", "50.0 %", "50.0 %"] in rows


@pytest.mark.real_model
def test_scores_refitting_and_budget_each_help_a_real_model(shared_models, shared_data):
    from transformers import AutoModelForCausalLM

    folder = shared_models / "stories260k"
    calibration = windows(folder, shared_data, "calibration", 12)
    held_out = windows(folder, shared_data, "eval", 16)

    def perplexity(**fields):
        model = AutoModelForCausalLM.from_pretrained(
            folder, optim_config={"technique": "nm", **fields}, calibration=calibration, dtype=torch.float32
        )
        return math.exp(mean_loss(model, held_out))

    magnitude, activation = perplexity(), perplexity(score="activation")
    refitted = perplexity(score="activation", compensate=True)
    budgeted = perplexity(score="activation", compensate=True, budget=0.5)
    assert activation < 0.75 * magnitude
    assert refitted < 0.65 * activation
    assert budgeted < 0.5 * refitted
