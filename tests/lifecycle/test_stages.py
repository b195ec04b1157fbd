"""The state machine of a run: states change after the work, and a stage that failed stays failed."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama
from toy_training import ToyRamp, arguments, begin

import hf_optim
from hf_optim import DataError, OptimError, hookimpl, run_of
from hf_optim.lifecycle.stages import complete_stage, enter_stage
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
        r"\[gptq\] failed while transforming and calibrating \(OutOfMemoryError: CUDA out of memory .*load it again"
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
            from transformers import TrainerCallback

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


def rows():
    return [{"input_ids": torch.arange(8) + 3, "labels": torch.arange(8) + 3} for _ in range(16)]
