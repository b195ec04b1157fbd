"""Sparse variational dropout in OptimTrainer: what is removed, the scale of its term, exact resumption, its effect."""

from __future__ import annotations

import math
import re

import pytest
import torch
from real_stories import Stories
from safetensors.torch import load_file
from tiny_models import tiny_gpt2, tiny_llama, tiny_qwen2
from torch import nn
from toy_training import arguments, sentences
from transformers import TrainerCallback

import hf_optim
from hf_optim import ModelError, OptimError, OptimTrainer, RecipeError, optimize, run_of
from hf_optim.recipes.traits import SPARSE, SPARSE_NM
from hf_optim.testing.trait_checks import holds
from hf_optim.toolkit.modules.modes import eval_mode
from hf_optim.toolkit.pruning import masks, sparse_variational
from hf_optim.toolkit.pruning.noisy_layers import NoisyLayer

IDS = torch.randint(3, 64, (4, 12), generator=torch.Generator().manual_seed(9))
# Variances that rise fast: a tenth or so of the weights is noise after a handful of steps.
QUICK = {"technique": "variational_dropout", "initial": -4.0, "variance_learning_rate": 0.5, "end": 0, "examples": 9}


class Watch(TrainerCallback):
    """Logits in evaluation mode and the variances after every optimizer step, before the end of that step."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        with eval_mode(model):
            self.logits = model(IDS).logits
        layers = {n: m for n, m in model.named_modules() if isinstance(m, NoisyLayer)}
        self.alphas = {
            f"{n}.weight": sparse_variational.log_alpha(m.weight, m.log_variance).detach() for n, m in layers.items()
        }


def train(model, folder, steps=5, resume=None, data=None, **more):
    watch = Watch()
    args = arguments(folder, max_steps=steps, **more)
    trainer = OptimTrainer(model=model, args=args, train_dataset=data or sentences(), callbacks=[watch])
    trainer.train(resume_from_checkpoint=resume)
    watch.log = trainer.state.log_history
    model.eval()
    return watch


def same(first, second):
    a, b = first.state_dict(), second.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_the_weights_above_the_threshold_are_removed_as_in_evaluation(build, tmp_path):
    model = optimize(build(), {**QUICK, "threshold": 1.0})
    run = run_of(model)
    watch = train(model, tmp_path)
    assert run.masks.keys() == watch.alphas.keys()
    for name, alpha in watch.alphas.items():
        assert torch.equal(run.masks[name], alpha <= 1.0)
        assert not model.get_parameter(name)[~run.masks[name]].any()
    share = 1 - sum(int(m.sum()) for m in run.masks.values()) / sum(m.numel() for m in run.masks.values())
    assert 0.02 < share < 0.98
    assert run.record.steps["0"]["sparsity"] == pytest.approx(share, abs=1e-5)
    assert holds(SPARSE, run)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, watch.logits, rtol=0, atol=1e-5)
    assert not any(isinstance(module, NoisyLayer) for module in model.modules())
    assert set(vars(run.state(run.recipe.steps[0]))) <= {"settled", "examples", "batches", "ramp", "above_threshold"}


def test_a_target_sparsity_removes_the_largest_alpha(tmp_path):
    model = optimize(tiny_llama(), {**QUICK, "sparsity": 0.6})
    watch = train(model, tmp_path)
    run = run_of(model)
    flat = torch.cat([alpha.flatten() for alpha in watch.alphas.values()])
    kept = torch.cat([run.masks[name].flatten() for name in watch.alphas])
    assert int((~kept).sum()) == masks.removed_count(kept.numel(), 0.6)
    assert flat[kept].max() <= flat[~kept].min() + 1e-5
    by_layer = optimize(tiny_llama(), {**QUICK, "sparsity": 0.6, "scope": "layer"})
    train(by_layer, tmp_path)
    assert all(int((~m).sum()) == masks.removed_count(m.numel(), 0.6) for m in run_of(by_layer).masks.values())


def test_the_term_is_the_divergence_over_the_number_of_labels_and_rises(tmp_path):
    """Two steps of two batches of two rows; at the first every weight still has its first variance."""
    step = {"technique": "variational_dropout", "initial": -6.0, "weight": 0.5, "begin": 0, "end": 2}
    model = tiny_llama()
    layers = [module for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"]
    total = sum(
        sparse_variational.kl_divergence(-6.0 - layer.weight.detach().square().clamp(min=1e-8).log()).sum()
        for layer in layers
    )
    watch = train(optimize(model, step), tmp_path, 3, logging_steps=1, logging_strategy="steps", learning_rate=0.0)
    terms = [entry["kl"] for entry in watch.log if "kl" in entry]
    assert terms[0] == 0.0
    moved = optimize(tiny_llama(), {**step, "variance_learning_rate": 0.0})
    watch = train(moved, tmp_path, 3, logging_steps=1, logging_strategy="steps", learning_rate=0.0)
    terms = [entry["kl"] for entry in watch.log if "kl" in entry]
    expected = 0.5 * float(total) / (16 * 12)
    assert terms == pytest.approx([0.0, expected / 2, expected], rel=1e-4)
    given = optimize(tiny_llama(), {**step, "variance_learning_rate": 0.0, "examples": 1000, "end": 0})
    watch = train(
        given, tmp_path, 1, logging_steps=1, logging_strategy="steps", learning_rate=0.0, gradient_accumulation_steps=2
    )
    assert watch.log[0]["kl"] == pytest.approx(0.5 * float(total) / 1000, rel=1e-4)


def test_without_noise_and_term_it_trains_as_a_dense_model(tmp_path):
    quiet = {"technique": "variational_dropout", "initial": -math.inf, "weight": 0.0, "variance_learning_rate": 0.0}
    model, dense = optimize(tiny_llama(), quiet), tiny_llama()
    train(model, tmp_path, 3)
    hf_optim.optimize(dense, {"technique": "gmp", "sparsity": 0.0})
    train(dense, tmp_path, 3)
    for (name, a), b in zip(model.named_parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.many(every=4)
@pytest.mark.parametrize("fields", [{"threshold": 1.0}, {"sparsity": 0.5, "settle": 4}], ids=str)
def test_a_checkpoint_is_ordinary_and_training_resumes_bit_exact(fields, tmp_path):
    step, more = {**QUICK, **fields}, {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2}
    whole = optimize(tiny_llama(), step)
    train(whole, tmp_path, 6, weight_decay=0.1, **more)
    assert load_file(tmp_path / "checkpoint-3" / "model.safetensors").keys() == tiny_llama().state_dict().keys()
    for at in (3, 5):
        again = optimize(tiny_llama(seed=1), step)
        train(again, tmp_path / "again", 6, resume=str(tmp_path / f"checkpoint-{at}"), weight_decay=0.1, **more)
        assert same(whole, again)
        assert all(torch.equal(mask, run_of(again).masks[name]) for name, mask in run_of(whole).masks.items())


def test_once_settled_the_remaining_weights_train_without_noise(tmp_path):
    model = optimize(tiny_llama(), {**QUICK, "sparsity": 0.5, "settle": 2})
    watch = train(model, tmp_path, 6, logging_steps=1, logging_strategy="steps")
    assert [("kl" in entry) for entry in watch.log if "task_loss" in entry or "loss" in entry] == [True] * 2 + [
        False
    ] * 4
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, watch.logits, rtol=0, atol=1e-5)


def test_weights_removed_by_an_earlier_step_stay_removed_and_count(tmp_path):
    model = optimize(tiny_gpt2(), [{"technique": "nm"}, {**QUICK, "sparsity": 0.7}])
    before = {name: mask.clone() for name, mask in run_of(model).masks.items()}
    train(model, tmp_path)
    run = run_of(model)
    assert holds(SPARSE_NM, run)
    assert SPARSE_NM in run.traits
    assert all(not (run.masks[name] & ~mask).any() for name, mask in before.items())
    removed = sum(int((~mask).sum()) for mask in run.masks.values())
    assert removed == masks.removed_count(sum(mask.numel() for mask in run.masks.values()), 0.7)


def test_heads_and_shared_weights_are_left_out(tmp_path):
    model = optimize(tiny_qwen2(), {**QUICK, "threshold": 0.0})
    train(model, tmp_path, 2)
    assert not any("lm_head" in name or "embed" in name for name in run_of(model).masks)
    tied = optimize(tiny_qwen2(), {**QUICK, "targets": ["lm_head"]})
    with pytest.raises(ModelError, match=r"step 1 \(variational_dropout\).*tied to .*: lm_head"):
        hf_optim.training.stage_callbacks.stage_callbacks(run_of(tied))


def test_a_stock_trainer_is_refused():
    with pytest.raises(OptimError, match="OptimTrainer"):
        hf_optim.callbacks(optimize(tiny_llama(), QUICK))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"begin": 9, "end": 3}, "begin must be <= end"),
        ({"end": 1.0, "settle": 0.2}, r"variational_dropout: end must be <= settle, not 1\.0 > 0\.2"),
        ({"threshold": math.nan}, "variational_dropout: threshold must be a finite number, not nan"),
        ({"threshold": -math.inf}, "threshold must be a finite number, not -inf"),
        ({"initial": math.inf}, "initial must be < inf"),
        ({"initial": math.nan}, "initial must be a finite number, not nan"),
        ({"settle": 1.5}, r"settle is a share of training in \[0, 1\] or a whole number"),
        ({"sparsity": 1.0}, "must be < 1"),
        ({"weight": -1.0}, "weight must be >= 0"),
    ],
)
def test_contradictory_fields_are_refused(fields, message):
    with pytest.raises(RecipeError, match=message):
        optimize(tiny_llama(), {"technique": "variational_dropout", **fields})


def test_an_unfinished_ramp_warns_at_the_start(tmp_path, caplog):
    sparse = ({"sparsity": 0.5}, r", and the ranking so far gives a sparsity of 0\.5")
    for number, (fields, addition) in enumerate([({}, ""), sparse]):
        model = optimize(tiny_llama(), {"technique": "variational_dropout", "end": 1000, **fields})
        message = r"step 1 \(variational_dropout\): the schedule ends at step 1000, but .* 10: .* 0\.01 instead of 1"
        caplog.clear()
        train(model, tmp_path / str(number), 10)
        assert re.search(message + addition, caplog.text)
        assert any("0.01 instead of 1" in note for note in run_of(model).record.notes)


@pytest.mark.real_model
def test_a_third_of_a_real_model_is_noise_at_held_loss(tmp_path, shared_models, shared_data):
    """Compared with as many weights of smallest magnitude, removed at once; both ranked over all layers."""
    stories = Stories(shared_models, shared_data, width=64, held_out=96)
    dense = stories.loss(stories.load())
    magnitude = stories.loss(stories.load([{"technique": "magnitude", "sparsity": 0.3, "scope": "global"}]))
    step = {"technique": "variational_dropout", "sparsity": 0.3, "weight": 0.3, "variance_learning_rate": 0.1}
    model = stories.load([{**step, "end": 0.2, "settle": 0.4}])
    train(model, tmp_path, 120, data=stories.rows, learning_rate=1e-3, per_device_train_batch_size=8)
    assert run_of(model).record.steps["0"]["sparsity"] == pytest.approx(0.3, abs=1e-3)
    found = stories.loss(model)
    assert found < magnitude - 0.2, (dense, magnitude, found)
    assert found < dense + 0.25, (dense, magnitude, found)
