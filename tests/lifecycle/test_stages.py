"""The state machine of a run: states change after the work, and a stage that failed stays failed."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from toy_training import ToyRamp, arguments, begin, toy
from transformers import Trainer, TrainerCallback

import hf_optim
from hf_optim import Contract, DataError, OptimError, Reload, Technique, hookimpl, run_of, technique
from hf_optim.lifecycle.stages import complete_stage, enter_stage
from hf_optim.recipes.config import OptimConfig
from hf_optim.recipes.traits import SPARSE
from hf_optim.runs.run import StageState
from hf_optim_plugins.quantization import gptq
from hf_optim_plugins.quantization.rtn import RTN

DATA = [{"input_ids": torch.arange(24).reshape(2, 12) % 60 + 3} for _ in range(3)]
RECIPE = [{"technique": "gptq", "bits": 4, "group_size": 16}]


@pytest.fixture
def half_quantized(monkeypatch):
    """A model whose calibration ran out of memory at the sixth layer."""
    real, calls = gptq.recurse, []

    def out_of_memory(*args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return real(*args, **kwargs)

    monkeypatch.setattr(gptq, "recurse", out_of_memory)
    model = tiny_llama()
    with pytest.raises(torch.OutOfMemoryError):
        hf_optim.optimize(model, RECIPE, calibration=DATA)
    monkeypatch.setattr(gptq, "recurse", real)
    return model


def test_a_stage_that_failed_in_calibration_is_not_taken_for_done(half_quantized):
    run = run_of(half_quantized)
    assert run.stage_state is StageState.FAILED
    message = (
        r"step 1 \(gptq\) failed while transforming and calibrating \(OutOfMemoryError: CUDA out of .*load it again"
    )
    with pytest.raises(OptimError, match=message):
        hf_optim.advance(half_quantized)
    assert not run.record.finished
    assert run.record.traits == []
    assert run.record.stages == []


def test_a_failed_model_is_not_saved_before_it_is_released(half_quantized, tmp_path):
    with pytest.raises(OptimError, match="can neither go on nor be saved"):
        half_quantized.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    hf_optim.release(half_quantized).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "hf_optim.json").exists()


class Fragile(ToyRamp):
    """Raises in ``finalize_model``."""

    @hookimpl
    def finalize_model(self, run):
        raise ZeroDivisionError("simulated")


def test_a_stage_that_failed_in_finalizing_stays_failed():
    model = tiny_llama()
    run = begin(model, Fragile())
    with pytest.raises(ZeroDivisionError):
        hf_optim.advance(model)
    with pytest.raises(OptimError, match="failed while finalizing"):
        hf_optim.advance(model)
    with pytest.raises(OptimError, match="failed while finalizing"):
        complete_stage(run)
    assert run.stage_index == 0


def test_missing_data_leaves_the_stage_pending(tmp_path):
    """A trained model is not given up for a mistyped file."""
    model = hf_optim.optimize(tiny_llama(), [ToyRamp(), RTN(activations="int8", dynamic=False)], calibration=None)
    run = run_of(model)
    for calibration, message in ((None, "call hf_optim.advance"), (str(tmp_path / "no.jsonl"), "no.jsonl")):
        with pytest.raises(DataError, match=message):
            hf_optim.advance(model, calibration=calibration)
        assert run.stage_state is StageState.PENDING
        run.source = None
    assert hf_optim.advance(model, calibration=DATA) is model
    assert run.finished


def test_a_failed_stage_is_not_trained(half_quantized):
    with pytest.raises(OptimError, match="load it again"):
        hf_optim.callbacks(half_quantized)


def test_the_states_of_a_stage_in_order():
    seen = []

    class Watching(ToyRamp):
        @hookimpl
        def transform_model(self, run):
            seen.append(("transform", run.stage_state))

        @hookimpl
        def finalize_model(self, run):
            seen.append(("finalize", run.stage_state))

    model = hf_optim.optimize(tiny_llama(), Watching())
    run = run_of(model)
    assert run.stage_state is StageState.ENTERED
    hf_optim.advance(model)
    assert seen == [("transform", StageState.PENDING), ("finalize", StageState.ENTERED)]
    assert run.finished
    with pytest.raises(OptimError, match="all stages of this recipe are complete"):
        enter_stage(run)


def test_training_that_raised_is_noted_when_its_stage_is_completed(tmp_path, caplog):
    class Exploding(ToyRamp):
        @hookimpl
        def training_callbacks(self, run):
            class Explode(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    raise KeyboardInterrupt

            return [Explode()]

    model = hf_optim.optimize(tiny_llama(), Exploding())
    trainer = hf_optim.OptimTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows())
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert run_of(model).stage_state is StageState.TRAINING
    model = hf_optim.advance(model)
    assert any("training did not reach its end" in note for note in run_of(model).record.notes)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hf_optim.json").read_text())["finished"] is True


@toy("raising")
class Raising(Technique):
    """Raises in one hook: ``transform_model`` or ``finalize_model``."""

    hook: str = "transform"

    @hookimpl
    def transform_model(self, run):
        self._raise("transform")

    @hookimpl
    def finalize_model(self, run):
        self._raise("finalize")

    def _raise(self, hook):
        if hook == self.hook:
            raise ZeroDivisionError(f"simulated in {hook}")


@technique("calibration_fails", family="toy", contract=Contract(keeps={SPARSE}), reload=Reload.STOCK_DENSE)
class CalibrationFails(Technique):
    """Changes the weights of the first block, and raises in the second."""

    @hookimpl
    def calibrate(self, run, scope):
        yield
        if "layers.1" in scope.name or not scope.name:
            raise ZeroDivisionError("simulated in calibrate")
        for parameter in scope.module.parameters():
            parameter.data.mul_(2)


def fails(model, index, tmp_path, message):
    """Assert that a run is where it was when a stage failed, and that no door takes the stage for done."""
    run = run_of(model)
    assert run.stage_state is StageState.FAILED
    assert run.stage_index == index
    assert len(run.record.stages) == len([entry for entry in run.record.stages if entry["steps"] != ["rtn"]])
    assert not run.finished
    assert not run.record.finished
    assert "quantized" not in {str(trait) for trait in run.traits}
    doors = {
        "advance": lambda: hf_optim.advance(model, calibration=DATA),
        "save": lambda: model.save_pretrained(tmp_path / "out"),
        "push": lambda: model.push_to_hub("name/of-a-repository"),
        "callbacks": lambda: hf_optim.callbacks(model),
        "trainer": lambda: hf_optim.OptimTrainer(
            model=model, args=arguments(tmp_path / "t"), train_dataset=rows()
        ).train(),
        "enter": lambda: enter_stage(run),
        "complete": lambda: complete_stage(run),
    }
    for call in doors.values():
        with pytest.raises(OptimError, match=message):
            call()
    assert not (tmp_path / "out").exists()
    assert run.stage_index == index


@pytest.mark.parametrize("driver", ["blockwise", "whole_model"])
@pytest.mark.parametrize("position", ["first", "second step", "after a quantizing step"])
def test_calibration_that_raises_leaves_the_run_where_it_was(driver, position, tmp_path):
    others = {"first": [], "second step": [{"technique": "magnitude", "sparsity": 0.5}]}
    steps = [*others.get(position, [RTN(bits=8)]), CalibrationFails()]
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError):
        hf_optim.optimize(model, OptimConfig(tuple(OptimConfig.parse(steps).steps), driver=driver), calibration=DATA)
    fails(model, 0, tmp_path, "failed while transforming and calibrating .*simulated in calibrate")


def test_a_transform_that_raises_leaves_the_run_where_it_was(tmp_path):
    model = tiny_llama()
    with pytest.raises(ZeroDivisionError):
        hf_optim.optimize(model, [Raising()])
    fails(model, 0, tmp_path, "failed while transforming and calibrating .*simulated in transform")


@pytest.mark.parametrize("how", ["trainer", "advance"])
def test_a_later_stage_that_raises_leaves_the_run_there(how, tmp_path):
    """The stage after a training begins inside of the Trainer, or with ``advance``."""
    model = hf_optim.optimize(tiny_llama(), [ToyRamp(), CalibrationFails(), RTN(bits=8)], calibration=DATA)
    trainer = hf_optim.OptimTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows())
    go_on = {"trainer": trainer.train, "advance": lambda: hf_optim.advance(model)}[how]
    with pytest.raises(ZeroDivisionError):
        go_on()
    fails(model, 1, tmp_path, "failed while transforming and calibrating .*simulated in calibrate")


@pytest.mark.parametrize("trainer", ["ours", "stock"])
def test_finalizing_that_raises_at_the_end_of_a_training(trainer, tmp_path):
    model = hf_optim.optimize(tiny_llama(), [Raising(hook="finalize")])
    kinds = {"ours": (hf_optim.OptimTrainer, None), "stock": (Trainer, hf_optim.callbacks(model))}
    kind, callbacks = kinds[trainer]
    with pytest.raises(ZeroDivisionError):
        kind(model=model, args=arguments(tmp_path / "t"), train_dataset=rows(), callbacks=callbacks).train()
    fails(model, 0, tmp_path, "failed while finalizing .*simulated in finalize")


def test_a_training_that_raised_is_not_a_finished_checkpoint(tmp_path):
    class Exploding(ToyRamp):
        @hookimpl
        def training_callbacks(self, run):
            class Explode(TrainerCallback):
                def on_step_end(self, args, state, control, **kwargs):
                    raise torch.OutOfMemoryError("simulated")

            return [Explode()]

    model = hf_optim.optimize(tiny_llama(), [Exploding(), RTN(bits=8)])
    trainer = hf_optim.OptimTrainer(model=model, args=arguments(tmp_path / "t"), train_dataset=rows())
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()
    run = run_of(model)
    assert (run.stage_index, run.stage_state) == (0, StageState.TRAINING)
    model.save_pretrained(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "hf_optim.json").read_text())["finished"] is False
    assert not any(entry["driver"] == "training" for entry in run.record.stages)


def rows():
    return [{"input_ids": torch.arange(8) + 3, "labels": torch.arange(8) + 3} for _ in range(16)]


def test_refusals_name_the_steps_of_a_stage_by_number():
    with pytest.raises(hf_optim.RecipeError, match=r"^move step 2 \(longformer\) before the steps that train"):
        hf_optim.OptimConfig.parse(["magnitude", "longformer"]).check()
    model = hf_optim.optimize(tiny_llama(), ["magnitude", "gmp"])
    run_of(model).stage_state = StageState.PENDING
    with pytest.raises(OptimError, match=r"^step 1 \(magnitude\), step 2 \(gmp\) was not prepared for training"):
        hf_optim.callbacks(model)
