"""A damaged checkpoint of a Trainer is refused by name when training resumes from it."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainingArguments

from hf_optim import CheckpointError, ModelError, OptimTrainer, optimize
from hf_optim.testing.models import tiny_llama

MASKS, STATE = "hf_optim_masks.safetensors", "hf_optim_state.json"


def resume(checkpoint, output, steps=2):
    model = optimize(tiny_llama(), [{"technique": "gmp", "sparsity": 0.5}])
    rows = [{"input_ids": row, "labels": row} for row in torch.arange(32).reshape(4, 8)]
    arguments = TrainingArguments(
        str(output), max_steps=steps, save_steps=2, per_device_train_batch_size=2, report_to=[], use_cpu=True
    )
    trainer = OptimTrainer(model=model, args=arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return model


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    home = tmp_path_factory.mktemp("whole")
    resume(None, home)
    return home / "checkpoint-2"


@pytest.fixture
def checkpoint(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "checkpoint-2")
    return tmp_path / "checkpoint-2"


def edit(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def without_a_tensor(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def with_another_name(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.weight_"] = tensors.pop("model.layers.0.mlp.up_proj.weight")
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})


def with_codes(checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: tensors[name].to(torch.int8)}, checkpoint / "model.safetensors", {"format": "pt"})


def truncated(name):
    return lambda checkpoint: (checkpoint / name).write_bytes((checkpoint / name).read_bytes()[:100])


def pipe(name):
    def put(checkpoint):
        (checkpoint / name).unlink()
        os.mkfifo(checkpoint / name)

    return put


def directory(name):
    def put(checkpoint):
        (checkpoint / name).unlink()
        (checkpoint / name).mkdir()

    return put


DAMAGE = {
    "weights without a tensor": (without_a_tensor, r"has no weights for .*\(model\.layers\.0\.mlp\.up_proj\.weight\)"),
    "a tensor of another name": (with_another_name, r"has no weights for .*\(model\.layers\.0\.mlp\.up_proj\.weight\)"),
    "codes in place of weights": (with_codes, r"up_proj\.weight is stored as I8, and its parameter is floating-point"),
    "truncated weights": (truncated("model.safetensors"), r"model\.safetensors .*truncated or corrupt"),
    "a truncated optimizer": (truncated("optimizer.pt"), "cannot resume from .*checkpoint-2"),
    "a pipe": (pipe("optimizer.pt"), "a pipe, not a regular file"),
    "a pipe for masks": (pipe(MASKS), "a pipe, not a regular file"),
    "a directory": (directory("trainer_state.json"), "a directory, not a regular file"),
    "a directory for the state": (directory(STATE), "Is a directory"),
    "no state of the trainer": (lambda home: (home / "trainer_state.json").unlink(), "no file 'trainer_state.json'"),
    "a step that is text": (
        lambda home: edit(home / "trainer_state.json", lambda data: data.update(global_step="2")),
        "global_step is '2'",
    ),
    "a changed state": (
        lambda home: edit(home / STATE, lambda data: data["run"].update(stage_index=0, notes=["x"])),
        "its checksum is another",
    ),
    "a state of other types": (
        lambda home: edit(home / STATE, lambda data: (data.pop("sha256"), data["run"].update(notes=3))),
        "notes is 3",
    ),
    "a stage that is not there": (
        lambda home: edit(home / STATE, lambda data: (data.pop("sha256"), data["run"].update(stage_index=7))),
        "it has no stage 7",
    ),
}


@pytest.mark.many
@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_refused(what, checkpoint, tmp_path):
    damage, message = DAMAGE[what]
    damage(checkpoint)
    with pytest.raises((CheckpointError, ModelError), match=message):
        resume(checkpoint, tmp_path / "out")


def test_a_whole_checkpoint_is_resumed_from(checkpoint, tmp_path):
    model = resume(checkpoint, tmp_path / "out")
    stored = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(stored[name], parameter) for name, parameter in model.named_parameters())
