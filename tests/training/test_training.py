"""The training side: callbacks for a stock Trainer, and OptimTrainer's loss, log and optimizer."""

from __future__ import annotations

import dataclasses
import inspect
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import tiny_bert, tiny_llama
from toy_training import ToyGroups, ToyLoss, ToyRamp, arguments, begin, sentences, toy
from transformers import Trainer, TrainerCallback, TrainingArguments

import hf_optim
from hf_optim import CheckpointError, NumericalError, OptimError, RecipeError, Run, Technique, hookimpl
from hf_optim.lifecycle.stages import complete_stage
from hf_optim.recipes.catalogue import catalogue
from hf_optim.runs.masking import stray_weights
from hf_optim.runs.run import StageState
from hf_optim.training.checkpoint_callback import MASKS_NAME, STATE_NAME, read_state, write_state
from hf_optim.training.mask_callback import MaskCallback
from hf_optim.training.nonfinite_callback import NonFiniteCallback
from hf_optim.training.trainer import OptimTrainer

NAME = "model.layers.0.mlp.up_proj.weight"


def train(trainer_class, model, folder: Path, data=None, callbacks=None, resume=None, **changes) -> Trainer:
    trainer = trainer_class(
        model=model, args=arguments(folder, **changes), train_dataset=data or sentences(), callbacks=callbacks
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], **(tolerance or {"rtol": 0, "atol": 0}), msg=name)


# -- the stage -------------------------------------------------------------------------------------------------------
def test_a_stage_ends_with_training_and_is_recorded(tmp_path):
    model = tiny_llama()
    run = begin(model, ToyRamp())
    train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model))
    assert run.finished
    assert str(next(iter(run.traits))) in {"sparse", "float-weights"}
    assert run.record.traits == ["float-weights", "sparse"]
    (entry,) = run.record.stages
    assert entry["steps"] == ["toy_ramp"]
    assert entry["training_steps"] == 4
    assert entry["seconds"] > 0
    assert entry["device"] == "cpu"
    assert entry["peak_memory_bytes"] > 0
    assert run.record.steps["0"]["finalized"]
    assert stray_weights(run) == []


def test_recovery_training_of_a_finished_run_keeps_the_masks_only(tmp_path):
    model = tiny_llama()
    run = begin(model, ToyRamp())
    complete_stage(run)
    assert hf_optim.callbacks(model) == []
    run.masks[NAME] = torch.rand_like(model.get_parameter(NAME)) < 0.5
    (keeper,) = hf_optim.callbacks(model)
    assert isinstance(keeper, MaskCallback)
    train(Trainer, model, tmp_path, callbacks=[keeper])
    assert stray_weights(run) == []
    assert run.record.stages == []


def test_a_model_without_a_run_is_refused():
    with pytest.raises(OptimError, match="was not optimized by hf_optim"):
        hf_optim.callbacks(tiny_llama())


@pytest.mark.parametrize("step", [ToyLoss(), ToyGroups()], ids=lambda s: s.name)
def test_what_a_stock_trainer_cannot_serve_is_refused(step):
    model = tiny_llama()
    begin(model, ToyRamp(), step)
    with pytest.raises(OptimError, match=rf"step 2 \({step.name}\) .* use hf_optim.OptimTrainer"):
        hf_optim.callbacks(model)


def test_a_stage_that_was_not_prepared_is_refused():
    model = tiny_llama()
    run = begin(model, ToyRamp())
    run.stage_state = StageState.PENDING
    with pytest.raises(OptimError, match=r"hf_optim\.advance\(model\) first"):
        hf_optim.callbacks(model)


@toy("toy_counting")
class Counting(Technique):
    """Counts calibration passes; a stage of its own behind one that trains."""

    data: bool = True

    @hookimpl
    def calibrate(self, run, scope):
        run.state(self).entered = True
        yield

    def needs_data(self) -> bool:
        return self.data


Counting.spec = Counting.spec.__class__(**{**vars(Counting.spec), "trains": False})


@pytest.mark.parametrize("data", [True, False])
def test_the_recipe_goes_on_as_far_as_the_data_allows(tmp_path, data: bool, caplog):
    model = tiny_llama()
    after = Counting(data=data)
    run = begin(model, ToyRamp(), after)
    train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model))
    assert run.finished is not data
    assert hasattr(run.state(after), "entered") is not data
    assert ("call model = hf_optim.advance(model, calibration=...)" in caplog.text) is data


def test_the_recipe_goes_on_to_a_step_that_copies_its_teacher(tmp_path, caplog):
    """logit_kd has ``transform_model``, and puts no other model in the place of the Trainer's."""
    model = tiny_llama()
    distilled = catalogue().get("logit_kd")()
    run = begin(model, ToyRamp(), Counting(data=False), distilled)
    assert len(run.stages) == 2
    train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model))
    assert "call model = hf_optim.advance" not in caplog.text
    assert run.stage is run.stages[1]
    assert run.stage_entered
    same(run.state(distilled).teacher, model)


# -- health ----------------------------------------------------------------------------------------------------------
@toy("toy_nan")
class Poison(Technique):
    """Makes the loss NaN at the third micro-batch, and never again."""

    @hookimpl
    def training_loss(self, run, model, inputs, outputs):
        own = run.state(self)
        own.steps = getattr(own, "steps", 0) + 1
        return {"poison": outputs.logits.mean() * (float("nan") if own.steps == 3 else 0.0)}


class Weights(TrainerCallback):
    """The weights after each step, and the steps that began."""

    def __init__(self) -> None:
        self.after, self.begun = {}, 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.begun = state.global_step + 1

    def on_optimizer_step(self, args, state, control, model=None, **kwargs) -> None:
        self.after[state.global_step + 1] = {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    ("optim", "saving", "begun"),
    [
        ("adamw_torch", {}, 3),  # asked at once
        ("adamw_torch_fused", {}, 4),  # asked one step later: the device left the step out by itself
        ("adamw_torch_fused", {"save_strategy": "steps", "save_steps": 1}, 3),  # before a checkpoint
        ("adamw_torch_fused", {"max_steps": 3}, 3),  # before the end
        ("sgd", {"save_strategy": "steps", "save_steps": 1}, 3),
    ],
)
def test_nan_stops_training_before_it_reaches_the_weights(tmp_path, optim: str, saving: dict, begun: int):
    model = tiny_llama()
    run = begin(model, Poison())
    weights = Weights()
    args = arguments(tmp_path, **{"optim": optim, "max_steps": 8, "weight_decay": 0.1, **saving})
    trainer = OptimTrainer(model=model, args=args, train_dataset=sentences(), callbacks=[weights])
    with pytest.raises(NumericalError, match=r"\[toy_nan\].* in step 3 \(first in model\."):
        trainer.train()
    assert weights.begun == begun
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights.after[2][name]), name
    inner = trainer.optimizer.optimizer
    for values in inner.state.values():
        assert all(bool(torch.isfinite(v).all()) for v in values.values() if isinstance(v, torch.Tensor))
        assert int(values.get("step", 2)) == 2
    assert not run.finished
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == (
        ["checkpoint-1", "checkpoint-2"] if "save_steps" in saving else []
    )
    if "save_steps" in saving:
        same(model, tiny_llama().from_pretrained(tmp_path / "checkpoint-2"))


def test_a_fused_optimizer_is_not_waited_for(tmp_path, monkeypatch):
    """While nothing breaks and nothing is saved, a step never reads its own verdict."""
    asked = []
    settle = NonFiniteCallback._read_open_check
    monkeypatch.setattr(
        NonFiniteCallback, "_read_open_check", lambda self: (asked.append(self._open and self._open.step), settle(self))
    )
    model = tiny_llama()
    begin(model, ToyRamp())
    args = {"optim": "adamw_torch_fused", "max_steps": 4}
    trainer = train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model), **args)
    # Before steps 1 to 4; after the last one, at the end of the epoch and at the end.
    assert asked == [None, 1, 2, 3, 4, None, None]
    assert not hasattr(trainer.optimizer.optimizer, "found_inf")


def test_training_goes_on_bit_by_bit_as_without_the_guard(tmp_path):
    models = []
    for guarded in (True, False):
        model = tiny_llama()
        begin(model, ToyRamp())
        callbacks = [c for c in hf_optim.callbacks(model) if guarded or not isinstance(c, NonFiniteCallback)]
        train(Trainer, model, tmp_path / str(guarded), callbacks=callbacks, optim="adamw_torch_fused")
        models.append(model)
    same(*models)


def test_what_a_step_trains_beside_the_model_is_watched():
    own = torch.nn.Parameter(torch.ones(2))
    model = tiny_llama()
    guard = NonFiniteCallback(begin(model, ToyRamp()))
    optimizer = torch.optim.SGD([*model.parameters(), own])
    own.grad = torch.tensor([1.0, float("inf")])
    args, state = SimpleNamespace(fp16=False), SimpleNamespace(global_step=4)
    with pytest.raises(NumericalError, match=r"in step 5 \(first in a parameter of a step\)"):
        guard.on_pre_optimizer_step(args, state, None, model=model, optimizer=optimizer)


def test_a_loss_scaler_may_skip_steps_but_not_for_ever():
    model = tiny_llama()
    guard = NonFiniteCallback(begin(model, ToyRamp()))
    args, state = SimpleNamespace(fp16=True), SimpleNamespace(global_step=0)
    parameter = next(model.parameters())
    for value in [float("inf")] * 24 + [1.0] + [float("inf")] * 24:
        parameter.grad = torch.full_like(parameter, value)
        guard.on_pre_optimizer_step(args, state, None, model=model)
    with pytest.raises(NumericalError, match="became NaN or infinite"):
        guard.on_pre_optimizer_step(args, state, None, model=model)


# -- checkpoints -----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("trainer_class", "elsewhere"), [(Trainer, False), (Trainer, True), (OptimTrainer, True)])
def test_resumed_training_ends_with_the_same_bits(tmp_path, trainer_class, elsewhere: bool):
    saving = {"save_strategy": "steps", "save_steps": 2}

    def run_and_train(folder: Path, resume=None, **changes):
        model = tiny_llama()
        run = begin(model, step := ToyRamp())
        callbacks = hf_optim.callbacks(model) if trainer_class is Trainer else None
        train(trainer_class, model, folder, callbacks=callbacks, resume=resume, **saving, **changes)
        return model, run, run.state(step)

    whole, run, own = run_and_train(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    tensors, meta = load_file(checkpoint / MASKS_NAME), json.loads((checkpoint / STATE_NAME).read_text())
    assert tensors[f"mask.{NAME}"].dtype == torch.bool
    assert tensors["state.0.trace"].tolist() == [1.0, 2.0]
    assert meta["run"]["states"]["0"] == {"calls": 2}
    assert sorted(p.name for p in checkpoint.glob(".*")) == []

    if elsewhere:
        (tmp_path / "moved").mkdir()
        checkpoint = checkpoint.rename(tmp_path / "moved" / "checkpoint-2")
    where = tmp_path / "new" if elsewhere else tmp_path / "whole"
    told = {"resume_from_checkpoint": str(checkpoint)} if trainer_class is Trainer and elsewhere else {}
    model, again, state = run_and_train(where, resume=str(checkpoint), **told)
    same(model, whole)
    assert state.calls == own.calls == 4
    kept = load_file(where / "checkpoint-4" / MASKS_NAME)
    assert kept["state.0.trace"].tolist() == [1.0, 2.0, 3.0, 4.0]
    assert again.masks.keys() == run.masks.keys()
    assert all(torch.equal(again.masks[name], run.masks[name]) for name in run.masks)
    assert again.record.stages[0]["seconds"] > meta["training"]["seconds"]


def test_resuming_without_or_with_broken_state_is_refused(tmp_path):
    saving = {"save_strategy": "steps", "save_steps": 2}
    model = tiny_llama()
    begin(model, ToyRamp())
    train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model), **saving)
    checkpoint = tmp_path / "checkpoint-2"

    def resume() -> None:
        model = tiny_llama()
        begin(model, ToyRamp())
        train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model), resume=str(checkpoint), **saving)

    good = (checkpoint / MASKS_NAME).read_bytes()
    (checkpoint / MASKS_NAME).write_bytes(good[: len(good) // 2])
    with pytest.raises(CheckpointError, match="checkpoint-2 is truncated or corrupt"):
        resume()
    other = (tmp_path / "checkpoint-4" / MASKS_NAME).read_bytes()
    (checkpoint / MASKS_NAME).write_bytes(other)
    with pytest.raises(CheckpointError, match=f"{MASKS_NAME} is corrupt: its checksum is another"):
        resume()
    state = json.loads((checkpoint / STATE_NAME).read_text())
    (checkpoint / STATE_NAME).write_text(json.dumps({key: state[key] for key in ("run", "training")}))  # as in 0.1
    with pytest.raises(CheckpointError, match=f"other masks than the weights.*{NAME.split('.')[0]}"):
        resume()
    (checkpoint / STATE_NAME).unlink()
    with pytest.raises(CheckpointError, match=f"has no {STATE_NAME}"):
        resume()


def test_the_masks_of_another_model_or_recipe_are_refused_before_anything_changes(tmp_path):
    model = tiny_llama()
    begin(model, ToyRamp())
    saving = {"save_strategy": "steps", "save_steps": 2}
    train(Trainer, model, tmp_path, callbacks=hf_optim.callbacks(model), **saving)
    checkpoint = tmp_path / "checkpoint-2"
    for other, steps, message in [
        (tiny_llama(intermediate_size=64), [ToyRamp()], rf"masks of another model: that of {NAME.split('.')[0]}.*bool"),
        (tiny_bert(), [ToyRamp()], r"BertForSequenceClassification has no such parameter"),
        (tiny_llama(), [ToyRamp(), ToyRamp()], r"another recipe \(1 steps, and this one has 2\)"),
        (tiny_llama(), [Counting()], r"step 1 was toy_ramp, and here it is toy_counting"),
    ]:
        run = begin(other, *steps)
        name = next(n for n, p in other.named_parameters() if p.dim() == 2)
        run.masks[name] = mine = torch.ones_like(other.get_parameter(name), dtype=torch.bool)
        run.state(steps[0]).calls = 7
        notes, traits, before = list(run.record.notes), set(run.traits), other.get_parameter(name).clone()
        with pytest.raises(CheckpointError, match=message):
            read_state(run, checkpoint)
        assert run.masks.keys() == {name}
        assert run.masks[name] is mine
        assert vars(run.state(steps[0])) == {"calls": 7}
        assert (run.record.notes, run.traits) == (notes, traits)
        assert torch.equal(other.get_parameter(name), before)


@toy("toy_fields")
class Fields(Technique):
    """Does nothing, by fields of several kinds."""

    end: int | float = 1
    skip: tuple[str, ...] = ("a",)
    device: str = "cpu"

    @hookimpl
    def training_callbacks(self, run: Run) -> list[TrainerCallback]:
        return []


@toy("toy_later")
class Later(Fields):
    """Stands in a stage of its own, behind training."""

    @hookimpl
    def calibrate(self, run, scope):
        yield


def test_a_checkpoint_of_other_fields_is_refused_before_anything_changes(tmp_path):
    """Masks of one sparsity under the ramp of another would end at neither."""
    folder = tmp_path / "checkpoint-2"
    folder.mkdir()
    write_state(begin(tiny_llama(), Fields(), Later()), folder, {})
    for fields, message in [
        ({"end": 1.0}, r"step 1 \(toy_fields\): .*checkpoint-2 was written with end=1, and here it is 1\.0: resume"),
        ({"end": 2}, "end=1, and here it is 2: resume with end=1, or start again from its weights"),
        ({"skip": ["b"]}, r"skip=\['a'\], and here it is \['b'\]"),
    ]:
        run = begin(tiny_llama(), Fields.from_dict(fields), Later())
        run.masks["mine"] = torch.ones(1)
        with pytest.raises(CheckpointError, match=message):
            read_state(run, folder)
        assert list(run.masks) == ["mine"]
    for there, here in [({"end": 2}, {}), ({"skip": ["a", "b"]}, {"skip": ["a", "b"], "end": 3})]:
        write_state(begin(tiny_llama(), Fields.from_dict(there), Later()), folder, {})
        with pytest.raises(CheckpointError, match="was written with end="):
            read_state(begin(tiny_llama(), Fields.from_dict(here), Later()), folder)


def test_fields_that_change_no_result_may_change_with_a_note(tmp_path):
    write_state(begin(tiny_llama(), Fields(), Later()), tmp_path, {})
    run = begin(tiny_llama(), Fields(device="cuda"), Later(end=5))
    read_state(run, tmp_path)
    assert run.record.notes == [
        "step 1 (toy_fields): resumed with device='cuda', where it was 'cpu'",
        "step 2 (toy_later): resumed with end=5, where it was 1",
    ]
    run = begin(tiny_llama(), Fields(), Later())
    run.stage_index = 1
    write_state(run, tmp_path, {})
    with pytest.raises(CheckpointError, match=r"step 2 \(toy_later\).*end=1, and here it is 5"):
        read_state(begin(tiny_llama(), Fields(), Later(end=5)), tmp_path)


def test_a_checkpoint_from_before_fields_were_kept_is_read(tmp_path):
    write_state(begin(tiny_llama(), Fields(end=3)), tmp_path, {})
    state = json.loads((tmp_path / STATE_NAME).read_text())
    assert state["run"].pop("fields") == [{"end": 3}]
    del state["sha256"]
    (tmp_path / STATE_NAME).write_text(json.dumps(state))
    run = begin(tiny_llama(), Fields())
    read_state(run, tmp_path)
    assert run.record.notes == []


def test_the_best_checkpoint_comes_back_with_its_masks(tmp_path):
    model = tiny_llama()
    run = begin(model, step := ToyRamp())
    data = sentences()
    trainer = Trainer(
        model=model,
        args=arguments(
            tmp_path,
            learning_rate=1.0,  # so that the first evaluation is the best
            save_strategy="steps",
            eval_strategy="steps",
            save_steps=1,
            eval_steps=1,
            load_best_model_at_end=True,
        ),
        train_dataset=data,
        eval_dataset=data,
        callbacks=hf_optim.callbacks(model),
    )
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    assert run.state(step).calls == 1
    assert run.masks[NAME].float().mean() > 0.85
    same(model, tiny_llama().from_pretrained(tmp_path / "checkpoint-1"))


# -- the loss --------------------------------------------------------------------------------------------------------
def test_the_trainer_keeps_its_signature():
    assert inspect.signature(OptimTrainer.__init__) == inspect.signature(Trainer.__init__)


def test_without_terms_it_is_the_stock_trainer(tmp_path):
    plain, ours = tiny_llama(), tiny_llama()
    begin(ours, ToyRamp(of="nothing"))
    data = sentences(ragged=True)
    train(Trainer, plain, tmp_path / "a", data, gradient_accumulation_steps=2)
    train(OptimTrainer, ours, tmp_path / "b", data, gradient_accumulation_steps=2)
    same(ours, plain)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_accumulation_equals_one_large_batch(tmp_path, smoothing: float):
    """Rows have different numbers of labels: a mean of means would be another loss."""
    data = sentences(8, ragged=True)
    models, logs = [], []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = tiny_llama()
        begin(model, ToyLoss())
        trainer = train(
            OptimTrainer,
            model,
            tmp_path / str(batch),
            data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            label_smoothing_factor=smoothing,
            optim="sgd",
            max_steps=2,
            logging_strategy="steps",
            logging_steps=1,
        )
        models.append(model)
        logs.append([entry for entry in trainer.state.log_history if "square" in entry])
    same(*models, rtol=1e-4, atol=1e-6)
    for one, other in zip(*logs, strict=True):
        for key in ("loss", "task_loss", "square"):
            assert one[key] == pytest.approx(other[key], rel=1e-4)


def test_a_model_that_ignores_the_item_count_gets_means_of_means(tmp_path):
    """Without num_items_in_batch the Trainer divides by the accumulation steps, and terms go with the task loss."""
    data = sentences(8, ragged=True)
    models = []
    for batch, accumulation in ((8, 1), (2, 4)):
        model = tiny_llama()
        model.accepts_loss_kwargs = False
        begin(model, Constant())
        trainer = train(
            OptimTrainer,
            model,
            tmp_path / str(batch),
            data,
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=1,
            logging_strategy="steps",
            logging_steps=1,
        )
        models.append(next(entry["decay"] for entry in trainer.state.log_history if "decay" in entry))
    assert models[0] == pytest.approx(models[1], rel=1e-5)


@toy("toy_constant")
class Constant(Technique):
    """A term that does not depend on the batch, and replaces the task loss."""

    @hookimpl
    def training_loss(self, run, model, inputs, outputs):
        return {"decay": run.model.get_parameter(NAME).square().sum(), "task_scale": 0.0}


@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_term_of_the_weights_counts_once_for_each_step(tmp_path, accumulation: int):
    model = tiny_llama()
    begin(model, Constant())
    before = model.get_parameter(NAME).detach().clone()
    data = sentences(8, ragged=True)
    train(
        OptimTrainer,
        model,
        tmp_path,
        data,
        gradient_accumulation_steps=accumulation,
        optim="sgd",
        max_steps=1,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    torch.testing.assert_close(model.get_parameter(NAME), before * (1 - 2 * 1e-2))


def test_terms_and_scales_of_several_steps(tmp_path):
    model = tiny_llama()
    begin(model, ToyLoss(task_scale=0.5), ToyLoss(weight=2.0, task_scale=0.5))
    trainer = train(
        OptimTrainer, model, tmp_path, max_steps=6, logging_strategy="steps", logging_steps=3, logging_first_step=True
    )
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in logs] == [1, 3, 6]
    for entry in logs:
        assert entry["square_2"] == pytest.approx(4 * entry["square"], rel=1e-5)
        assert entry["loss"] == pytest.approx(
            0.25 * entry["task_loss"] + entry["square"] + entry["square_2"], rel=1e-3, abs=2e-3
        )


def test_evaluation_has_no_terms(tmp_path):
    losses = []
    for steps in ((ToyRamp(of="nothing"),), (ToyLoss(weight=100.0, task_scale=0.0),)):
        model = tiny_llama()
        begin(model, *steps)
        trainer = OptimTrainer(model=model, args=arguments(tmp_path), eval_dataset=sentences(ragged=True))
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]


def test_bf16_autocast_and_activation_checkpointing(tmp_path):
    model = tiny_llama()
    run = begin(model, ToyRamp(), ToyLoss())
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"  # 5.17
    train(OptimTrainer, model, tmp_path, bf16=True, **{name: True})
    assert run.finished
    assert stray_weights(run) == []
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_callbacks_passed_twice_act_once(tmp_path):
    model = tiny_llama()
    run = begin(model, step := ToyRamp())
    train(OptimTrainer, model, tmp_path, callbacks=hf_optim.callbacks(model))
    assert run.state(step).calls == 4
    assert len(run.record.stages) == 1


def test_model_init_brings_its_own_run(tmp_path):
    runs = []

    def model_init():
        model = tiny_llama()
        runs.append(begin(model, ToyRamp()))
        return model

    trainer = OptimTrainer(model_init=model_init, args=arguments(tmp_path), train_dataset=sentences())
    trainer.train()
    assert [run.finished for run in runs] == [False] * (len(runs) - 1) + [True]
    keepers = [c for c in trainer.callback_handler.callbacks if isinstance(c, MaskCallback)]
    assert [keeper.run for keeper in keepers] == [runs[-1]]


# -- the optimizer ---------------------------------------------------------------------------------------------------
def test_parameter_groups_leave_the_default_ones(tmp_path):
    model = tiny_llama()
    run = begin(model, step := ToyGroups(of="layers.0", extra=True))
    trainer = OptimTrainer(model=model, args=arguments(tmp_path, weight_decay=0.3), train_dataset=sentences())
    optimizer = trainer.create_optimizer()
    assert trainer.create_optimizer() is optimizer
    names = {id(p): name for name, p in model.named_parameters()} | {id(run.state(step).own): "own"}
    found = [
        (group["lr"], group["weight_decay"], sorted(names[id(p)] for p in group["params"]))
        for group in optimizer.param_groups
    ]
    everything = [name for _, _, members in found for name in members]
    assert sorted(everything) == sorted(names.values())
    claimed = {name for lr, _, members in found if lr == 0.5 for name in members}
    assert claimed == {name for name in names.values() if "layers.0" in name or name == "own"}
    for _, decay, members in found:
        assert decay == 0.3 or all("norm" in name or name == "own" for name in members)
        assert decay == 0.0 or not any("norm" in name for name in members)
    trainer.train()
    assert run.finished


@toy("toy_gate")
class Gate(Technique):
    """Trains a factor beside the model, which the loss sees."""

    @hookimpl
    def training_callbacks(self, run):
        run.state(self).gate = torch.nn.Parameter(torch.full((3,), 2.0))
        return []

    @hookimpl
    def parameter_groups(self, run, model):
        return [{"params": [run.state(self).gate], "lr": 0.1}]

    @hookimpl
    def training_loss(self, run, model, inputs, outputs):
        return {"gate": (run.state(self).gate * outputs.logits.square().mean()).sum()}


def test_what_a_step_trains_beside_the_model_is_resumed_to_the_same_bits(tmp_path):
    found = []
    for resume in (None, str(tmp_path / "checkpoint-2")):
        model = tiny_llama()
        begin(model, Gate())
        saving = {"save_strategy": "steps", "save_steps": 2}
        trainer = train(OptimTrainer, model, tmp_path, resume=resume, **saving)
        own = {id(p) for p in model.parameters()}
        (gate,) = [p for group in trainer.optimizer.param_groups for p in group["params"] if id(p) not in own]
        assert gate.grad is None  # not summed over steps
        found.append(gate.detach().clone())
        assert not any(key.endswith("gate") for key in load_file(tmp_path / "checkpoint-4" / "model.safetensors"))
    assert torch.equal(*found)
    assert not torch.equal(found[0], load_file(tmp_path / "checkpoint-2" / MASKS_NAME)["state.0.gate"])


def test_several_ranks_do_not_train_what_only_each_of_them_knows(tmp_path, monkeypatch):
    model = tiny_llama()
    begin(model, Gate())
    trainer = OptimTrainer(model=model, args=arguments(tmp_path), train_dataset=sentences())
    monkeypatch.setattr("hf_optim.toolkit.distributed.collectives.world_size", lambda: 2)
    with pytest.raises(OptimError, match=r"step 1 \(toy_gate\) trains a parameter that is not part of the model"):
        trainer.create_optimizer()


def test_two_claims_to_one_parameter_are_refused(tmp_path):
    model = tiny_llama()
    begin(model, ToyGroups(of="layers.0.mlp"), ToyGroups(of="up_proj"))
    trainer = OptimTrainer(model=model, args=arguments(tmp_path), train_dataset=sentences())
    with pytest.raises(
        RecipeError, match=r"step 1 \(toy_groups\) and step 2 \(toy_groups\) both claim .*0\.mlp\.up_proj"
    ):
        trainer.train()


def test_groups_need_an_optimizer_that_is_not_there_yet(tmp_path):
    model = tiny_llama()
    begin(model, ToyGroups())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = OptimTrainer(
        model=model, args=arguments(tmp_path), train_dataset=sentences(), optimizers=(optimizer, None)
    )
    with pytest.raises(OptimError, match=r"step 1 \(toy_groups\) sets its own optimizer groups"):
        trainer.train()


def test_a_classifier_trains(tmp_path):
    model = tiny_bert()
    run = begin(model, ToyRamp(of="intermediate"))
    data = [{"input_ids": row["input_ids"], "labels": i % 3} for i, row in enumerate(sentences())]
    train(OptimTrainer, model, tmp_path, data)
    assert run.finished
    assert stray_weights(run) == []


class Unhurried(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs) -> None:
        control.should_training_stop = True


def test_a_training_that_is_stopped_early_still_ends_its_stage(tmp_path):
    model = tiny_llama()
    run = begin(model, ToyRamp())
    train(Trainer, model, tmp_path, callbacks=[*hf_optim.callbacks(model), Unhurried()])
    assert run.finished
    assert run.record.stages[0]["training_steps"] == 1
