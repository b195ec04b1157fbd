"""Masks with what a Trainer offers: accumulation, precision, checkpointing, kills, early stopping, adapters; and one
stage of sparsity, distillation and quantization."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny_models import tiny_llama
from toy_training import ToyRamp, arguments, begin, sentences
from transformers import AutoModelForCausalLM, EarlyStoppingCallback, Trainer, TrainerCallback

import hf_optim
from hf_optim.compressed.state import quantized_modules
from hf_optim.runs.masking import stray_weights
from hf_optim.testing.trait_checks import holds
from hf_optim.training.checkpoint_callback import MASKS_NAME
from hf_optim.training.peft import keep_masks, merge_adapters
from hf_optim.training.trainer import OptimTrainer

NAME = "model.layers.0.mlp.up_proj.weight"
GMP = {"technique": "gmp", "sparsity": 0.6, "every": 1}


def train(model, folder: Path, resume=None, more=(), trainer_class=Trainer, data=None, **changes):
    """Train a model that waits for it; returns its run, which then owns the model."""
    run = hf_optim.run_of(model)
    callbacks = [*more, *hf_optim.callbacks(model)] if trainer_class is Trainer else [*more]
    rows = data or sentences()
    trainer = trainer_class(
        model=model, args=arguments(folder, **changes), train_dataset=rows, eval_dataset=rows, callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    run.model = run.model  # not only lent to the caller
    return run


def agree(one, other, **tolerance: float) -> None:
    """Two runs with the same masks and weights; bit by bit unless a tolerance is given."""
    assert one.masks.keys() == other.masks.keys()
    assert one.masks
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name]), name
    for (name, ours), theirs in zip(one.model.named_parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


def test_accumulation_prunes_and_trains_as_one_large_batch(tmp_path):
    data = sentences(32, ragged=True)
    runs = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = tiny_llama()
        begin(model, ToyRamp(at="on_pre_optimizer_step"))
        settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        runs.append(train(model, tmp_path / str(batch), data=data, optim="sgd", weight_decay=0.1, **settings))
        assert stray_weights(runs[-1]) == []
        assert runs[-1].record.stages[0]["training_steps"] == 4
    agree(*runs, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adafactor"])
def test_weights_of_16_bits_stay_under_their_masks(tmp_path, optim: str):
    model = hf_optim.optimize(tiny_llama().bfloat16(), [GMP])
    run = train(model, tmp_path, bf16=True, optim=optim, weight_decay=0.1)
    assert model.dtype == torch.bfloat16
    assert stray_weights(run) == []
    assert run.record.steps["0"]["sparsity"] == pytest.approx(0.6, abs=0.001)


def test_activation_checkpointing_changes_nothing(tmp_path):
    runs = []
    for on in (False, True):
        model = hf_optim.optimize(tiny_llama(), [GMP])
        runs.append(train(model, tmp_path / str(on), activation_checkpointing=on, optim="adamw_torch"))
        assert model.is_gradient_checkpointing is on
    agree(*runs, rtol=1e-5, atol=1e-6)


class Killed(TrainerCallback):
    """Ends the process, as far as one process can, in the middle of the fourth step."""

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.many(every=4)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_killed_training_goes_on_to_the_same_bits(tmp_path, scope: str):
    recipe = [{**GMP, "scope": scope, "initial": 0.2}]
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "gradient_accumulation_steps": 2}
    whole = train(hf_optim.optimize(tiny_llama(), recipe), tmp_path / "whole", **settings)
    with pytest.raises(KeyboardInterrupt):
        train(hf_optim.optimize(tiny_llama(), recipe), tmp_path / "killed", more=[Killed()], **settings)
    kept = load_file(tmp_path / "killed" / "checkpoint-2" / MASKS_NAME)
    again = train(hf_optim.optimize(tiny_llama(), recipe), tmp_path / "killed", resume=True, **settings)
    agree(again, whole)
    assert not torch.equal(kept[f"mask.{NAME}"], whole.masks[NAME])  # the ramp went on
    assert again.record.steps == whole.record.steps


def test_early_stopping_ends_the_stage_with_the_masks_of_the_best_checkpoint(tmp_path):
    model = tiny_llama()
    run = begin(model, step := ToyRamp())
    every = {"save_strategy": "steps", "eval_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    settings = {"learning_rate": 1.0, "max_steps": 8, "load_best_model_at_end": True, "save_total_limit": 1}
    train(model, tmp_path, more=[EarlyStoppingCallback(early_stopping_patience=2)], **settings, **every)
    assert run.finished
    assert run.record.stages[0]["training_steps"] == 3  # the first was the best, and two were worse
    assert run.state(step).calls == 1
    best = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1")
    saved = load_file(tmp_path / "checkpoint-1" / MASKS_NAME)
    for name, mask in run.masks.items():
        assert torch.equal(mask, saved[f"mask.{name}"])
        assert torch.equal(model.get_parameter(name), best.get_parameter(name))
    assert stray_weights(run) == []


def divergence(model, teacher) -> float:
    ids = torch.stack([row["input_ids"] for row in sentences(8, seed=5)])
    with torch.no_grad():
        ours, theirs = (m.eval()(ids).logits.log_softmax(-1) for m in (model, teacher))
    return float(torch.nn.functional.kl_div(ours, theirs, log_target=True, reduction="batchmean"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_a_pruned_student_with_adapters_learns_from_its_dense_self(tmp_path):
    base = hf_optim.optimize(tiny_llama(), [{"technique": "nm"}, {"technique": "logit_kd", "alpha": 1.0}])
    run = hf_optim.run_of(base)
    torch.manual_seed(0)
    settings = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "lora_dropout": 0.0}
    model = keep_masks(get_peft_model(base, LoraConfig(**settings)))
    before = divergence(model, tiny_llama())
    train(model, tmp_path, trainer_class=OptimTrainer, data=sentences(64), learning_rate=1e-2, max_steps=120)
    assert not run.finished
    merged = merge_adapters(model)
    assert run.finished
    assert stray_weights(run) == []
    assert all(holds(trait, run) for trait in run.traits)
    assert divergence(merged, tiny_llama()) < 0.6 * before
    merged.save_pretrained(tmp_path / "merged")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not read.get_parameter(NAME)[~run.masks[NAME]].any()


@pytest.mark.parametrize("more", [{}, {"learn_scales": True}, {"activations": "int8"}])
def test_sparsity_distillation_and_quantization_are_one_stage(tmp_path, more: dict):
    recipe = [{"technique": "nm"}, {"technique": "logit_kd", "alpha": 0.9}, {"technique": "qat", "bits": 4, **more}]
    model = hf_optim.optimize(tiny_llama(), recipe)
    run = hf_optim.run_of(model)
    assert [step.name for step in run.stage.steps] == ["nm", "logit_kd", "qat"]
    assert len(run.stages) == 1
    seen = []

    class Watch(TrainerCallback):
        def on_optimizer_step(self, args, state, control, **kwargs) -> None:
            seen.append(stray_weights(run))

    before = model.get_parameter(NAME).detach().clone()
    saving = {"save_strategy": "steps", "save_steps": 2, "logging_strategy": "steps", "logging_steps": 1}
    trainer = OptimTrainer(
        model=model, args=arguments(tmp_path / "t", **saving), train_dataset=sentences(), callbacks=[Watch()]
    )
    trainer.train()
    assert seen == [[]] * 4
    assert all("kd" in entry for entry in trainer.state.log_history if "loss" in entry)
    assert run.finished
    assert {str(trait) for trait in run.traits} >= {"sparse", "sparse-nm", "quantized"}
    assert all(holds(trait, run) for trait in run.traits)
    assert len(quantized_modules(model)) == len(run.masks) == 14
    assert not torch.equal(model.get_parameter(NAME), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(tmp_path / "out")
        read = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = sentences(1)[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)
    for name, mask in run.masks.items():
        for decoded in (model.get_parameter(name), read.get_parameter(name)):
            assert not decoded[~mask].any(), name
            assert decoded[mask].count_nonzero() > 0.5 * mask.sum()
            assert decoded[0].unique().numel() <= 16  # one scale a row
