"""Gradual magnitude pruning in a stock Trainer: the ramp, monotone masks, resumption, and its effect."""

from __future__ import annotations

import re

import pytest
import torch
from exported import exported
from real_stories import Stories
from tiny_models import tiny_gpt2, tiny_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim import ModelError, OptimConfig, RecipeError, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.pruning import masks
from hf_optim.toolkit.pruning.schedules import cubic_sparsity


class Watch(TrainerCallback):
    """Keeps the masks after every step; placed after the callbacks of the run."""

    def __init__(self, run):
        self.run, self.seen = run, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.seen[state.global_step] = {name: mask.clone() for name, mask in self.run.masks.items()}
        for name, mask in self.run.masks.items():
            assert not self.run.model.get_parameter(name)[~mask].any()


def rows(count=64, width=12):
    tokens = torch.randint(3, 64, (count, width), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder, steps, **more):
    settings = {
        "output_dir": str(folder),
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**settings, **more})


def train(model, folder, steps, resume=None, data=None, **more):
    watch = Watch(run_of(model))
    trainer = Trainer(
        model=model,
        args=arguments(folder, steps, **more),
        train_dataset=data or rows(),
        callbacks=[*hf_optim.callbacks(model), watch],
    )
    trainer.train(resume_from_checkpoint=resume)
    return watch.seen


def total_sparsity(found):
    return 1 - sum(int(mask.sum()) for mask in found.values()) / sum(mask.numel() for mask in found.values())


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_ramp_at_every_step_and_masks_monotone(tmp_path, scope):
    step = {"technique": "gmp", "sparsity": 0.8, "initial": 0.1, "begin": 2, "end": 14, "every": 3, "scope": scope}
    model = hf_optim.optimize(tiny_llama(), step)
    seen = train(model, tmp_path, 18)
    assert seen[1] == {}
    for t in range(2, 19):
        updated = min(14, t - (t - 2) % 3)
        expected = cubic_sparsity(updated, 2, 14, 0.1, 0.8)
        for mask in seen[t].values() if scope == "layer" else ():
            assert int((~mask).sum()) == masks.removed_count(mask.numel(), expected)
        assert total_sparsity(seen[t]) == pytest.approx(expected, abs=1e-3)
        if t > 2:
            assert all(not (mask & ~seen[t - 1][name]).any() for name, mask in seen[t].items())
    run = run_of(model)
    assert SPARSE in run.traits
    assert holds(SPARSE, run)
    assert run.record.steps["0"]["sparsity"] == pytest.approx(0.8, abs=1e-3)


def test_an_update_removes_the_currently_smallest_weights(tmp_path):
    """The mask follows from the trained weights, not from the initial ones."""
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp", "begin": 4, "end": 4})
    run = run_of(model)
    trained = {}

    class Before(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                trained.update({name: p.detach().clone() for name, p in model.named_parameters()})

    trainer = Trainer(
        model=model, args=arguments(tmp_path, 4), train_dataset=rows(), callbacks=[Before(), *hf_optim.callbacks(model)]
    )
    trainer.train()
    for name, mask in run.masks.items():
        assert torch.equal(mask, masks.layer_masks({"w": trained[name]}, 0.5)["w"])
        assert torch.equal(model.get_parameter(name), trained[name] * mask)


def test_shares_of_training_and_the_update_at_the_start(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp", "initial": 0.3, "begin": 0.0, "end": 1.0, "every": 4})
    seen = train(model, tmp_path, 8)
    assert total_sparsity(seen[1]) == pytest.approx(0.3, abs=1e-3)
    assert total_sparsity(seen[4]) == pytest.approx(cubic_sparsity(4, 0, 8, 0.3, 0.5), abs=1e-3)
    assert total_sparsity(seen[8]) == pytest.approx(0.5, abs=1e-3)


def test_resuming_in_the_ramp_is_bit_exact(tmp_path):
    step = {"technique": "gmp", "sparsity": 0.7, "begin": 1, "end": 10, "every": 2}
    whole = hf_optim.optimize(tiny_llama(), step)
    train(whole, tmp_path, 12, save_strategy="steps", save_steps=5)
    again = hf_optim.optimize(tiny_llama(seed=1), step)
    seen = train(again, tmp_path, 12, resume=str(tmp_path / "checkpoint-5"))
    assert min(seen) == 6
    for (name, a), b in zip(whole.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert run_of(whole).masks.keys() == run_of(again).masks.keys()
    assert all(torch.equal(mask, run_of(again).masks[name]) for name, mask in run_of(whole).masks.items())


def test_a_ramp_longer_than_training_warns_with_what_is_reached(tmp_path, caplog):
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp", "sparsity": 0.9, "begin": 0, "end": 20, "every": 4})
    reached = cubic_sparsity(8, 0, 20, 0.0, 0.9)
    seen = train(model, tmp_path, 10)
    assert re.search(f"ends at step 20.*sparsity of {reached:.4f} instead of 0.9", caplog.text)
    assert total_sparsity(seen[10]) == pytest.approx(reached, abs=1e-3)
    assert any("instead of 0.9" in note for note in run_of(model).record.notes)


def test_the_card_has_the_share_that_is_zero(tmp_path):
    """Of the targeted weights, which are not of one sparsity in every layer, and not 0.6 after an unfinished ramp."""
    step = {"technique": "gmp", "sparsity": 0.6, "initial": 0.1, "end": 8, "every": 1, "scope": "global"}
    model = hf_optim.optimize(tiny_llama(), step)
    train(model, tmp_path, 5)
    weights = [m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"]
    zeros = sum(int((weight == 0).sum()) for weight in weights) / sum(weight.numel() for weight in weights)
    assert 0.1 < zeros < 0.59
    assert abs(zeros - sum(float((w == 0).float().mean()) for w in weights) / len(weights)) > 0.001
    assert run_of(model).record.steps["0"]["sparsity"] == round(zeros, 6)
    sections = exported(model)
    (text,) = sections.paragraphs.values()
    assert text.startswith(f"Pruned during training, from 10 % towards 60 % along a cubic ramp; {100 * zeros:.1f} % of")


def test_an_existing_pattern_survives(tmp_path):
    model = hf_optim.optimize(tiny_gpt2(), [{"technique": "nm"}, {"technique": "gmp", "sparsity": 0.7, "end": 4}])
    train(model, tmp_path, 5)
    run = run_of(model)
    assert SPARSE_NM in run.traits
    assert all(masks.parameter_has_nm_pattern(model, name, *pattern) for name, pattern in run.nm_patterns.items())
    assert total_sparsity(run.masks) == pytest.approx(0.7, abs=1e-3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": 9, "end": 3}, "begin must be <= end"),
        ({"end": 1.5}, r"share of training in \[0, 1\] or a whole number"),
        ({"initial": 0.6}, "initial must be <= sparsity"),
        ({"every": 0}, "every must be >= 1"),
        ({"sparsity": 1.0}, "must be < 1"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        OptimConfig.parse([{"technique": "gmp", **fields}])


def test_a_mixed_ramp_that_ends_before_it_begins_is_refused(tmp_path):
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp", "begin": 8, "end": 0.5})
    with pytest.raises(RecipeError, match="begins at step 8 and ends at step 5 of 10"):
        train(model, tmp_path, 10)


def test_nothing_to_prune_is_an_error():
    model = hf_optim.optimize(tiny_llama(), {"technique": "gmp", "targets": ["*.up_proj"], "skip": ["*.mlp.*"]})
    with pytest.raises(ModelError, match=r"step 1 \(gmp\).*check targets and skip"):
        hf_optim.callbacks(model)


@pytest.mark.real_model
def test_gradual_is_better_than_one_shot_at_equal_steps(tmp_path, shared_models, shared_data):
    stories = Stories(shared_models, shared_data)

    def loss_after(recipe):
        model = stories.load(recipe)
        train(model, tmp_path, 240, data=stories.rows, learning_rate=3e-3, lr_scheduler_type="constant")
        assert total_sparsity(run_of(model).masks) == pytest.approx(0.8, abs=1e-3)
        return stories.loss(model)

    gradual = loss_after([{"technique": "gmp", "sparsity": 0.8, "end": 0.7, "every": 5}])
    one_shot = loss_after([{"technique": "magnitude", "sparsity": 0.8}])
    assert gradual < one_shot - 0.05
