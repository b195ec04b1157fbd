"""Recipes of strangers: refused while they are read, quickly, in one line, with the reason."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest

from hf_optim import OptimConfig, RecipeError
from hf_optim.cli import main
from hf_optim.recipes.training_fields import FIELDS

BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(8)
)
TEXTS = {
    "aliases": (BOMB + "training: *i\nsteps: [rtn]\n", "more than 20,000 values"),
    "an alias in its own anchor": ("steps: &a [*a]\n", "inside its own anchor"),
    "nested lists": ("steps: " + "[" * 100_000, "nested more than 100 levels"),
    "nested mappings": ("{a: " * 50_000, "nested more than 100 levels"),
    "nested lines": ("steps:\n" + "".join(" " * i + "- \n" for i in range(400)), "nested more than 100 levels"),
    "a megabyte": ("steps: [rtn]\ndescription: " + "x" * 1_000_000, "at most 200,000"),
    "many values": ("steps: [" + "rtn," * 25_000 + "]", "more than 20,000 values"),
    "many steps": ("steps: [" + "rtn," * 1000 + "]", "at most 100"),
    "merge keys": ("a: &a {technique: rtn}\nsteps: [{<<: *a}]", "merge keys"),
    "a key twice": ("steps: [rtn]\nsteps: [gptq]", "occurs twice"),
    "an object": ("steps: !!python/object/apply:os.system [ls]", "tag"),
    "a set": ("steps: !!set {rtn}", "tag"),
    "a key that is a number": ("steps: [rtn]\n1: 2", "not text"),
    "a key that is a list": ("steps: [rtn]\n[a]: 2", "not text"),
    "5,000 digits": ("steps: [{technique: rtn, bits: " + "9" * 5000 + "}]", "digits"),
    "a word as int": ("steps: [{technique: rtn, bits: !!int x}]", "plain YAML"),
    "a large integer": ("steps: [{technique: gptq, block_size: " + "9" * 30 + "}]", "2\\^63"),
    "a control character": ("steps: [rtn]\x00", "plain YAML"),
    "nothing": ("", "not a recipe"),
    "a scalar": ("5", "not a recipe"),
    "a long name": ("steps: [" + "x" * 100_000 + "]", "no technique"),
    "a long key": ("steps: [{technique: rtn, ? " + "x" * 1001 + " : 1}]", "not the name of a field"),
    "spill": ("steps: [rtn]\ndriver: streamed\nspill: 5", "spill must be text"),
    "driver": ("steps: [rtn]\ndriver: [a]", "driver must be one of"),
    "description": ("steps: [rtn]\ndescription: [a]", "description:. must be text"),
    "calibration": ("steps: [rtn]\ncalibration: [a]", "must be a mapping"),
    "no calibration": ("steps: [rtn]\ncalibration: false", "must be a mapping"),
    "dataset": ("steps: [rtn]\ncalibration: {dataset: [a]}", "dataset must be text"),
    "split": ("steps: [rtn]\ncalibration: {split: null}", "split must be text"),
    "seed": ("steps: [rtn]\ncalibration: {seed: x}", "seed must be a whole number"),
    "a negative seed": ("steps: [rtn]\ncalibration: {seed: -1}", "seed must be a whole number"),
    "samples": ("steps: [rtn]\ncalibration: {samples: 1.0e+30}", "samples must be a whole number"),
    "seq_len": ("steps: [rtn]\ncalibration: {seq_len: 9999999999}", "seq_len must be a whole number"),
    "batch_size": ("steps: [rtn]\ncalibration: {batch_size: true}", "batch_size must be a whole number"),
}


def refusal(path) -> str:
    began = time.process_time()
    with pytest.raises(RecipeError) as caught:
        OptimConfig.parse(path)
    assert time.process_time() - began < 4
    assert len(str(caught.value)) < 900 + len(str(path))
    return str(caught.value)


@pytest.mark.parametrize(("text", "message"), TEXTS.values(), ids=TEXTS)
def test_a_recipe_that_cannot_be_read(text, message, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        raise RecipeError(refusal(path))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "NaN",
        "[" * 100_000,
        '{"steps": ["rtn"], "steps": ["gptq"]}',
        '{"steps": [1e400]}',
        "[" + "9" * 5000 + "]",
    ],
)
def test_a_json_recipe_that_cannot_be_read(text, tmp_path):
    path = tmp_path / "r.json"
    path.write_text(text)
    refusal(path)


@pytest.mark.parametrize("content", [b"steps: [\xff]", "steps: [rtn]".encode("utf-16")])
def test_a_recipe_of_another_encoding(content, tmp_path):
    path = tmp_path / "r.yaml"
    path.write_bytes(content)
    assert "not UTF-8" in refusal(path)


def test_a_byte_order_mark_aliases_and_null_sections_are_read(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "\ufeffsteps: [&a {technique: rtn, bits: 4}, *a]\ntraining:\ncalibration:\nspill:\ndriver:\n", "utf-8"
    )
    assert [step.bits for step in OptimConfig.parse(path).steps] == [4, 4]


def test_a_directory_and_a_pipe_in_place_of_a_recipe(tmp_path):
    (tmp_path / "d.yaml").mkdir()
    refusal(tmp_path / "d.yaml")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "p.yaml")
        assert "not a regular file" in refusal(tmp_path / "p.yaml")


# -- training ---------------------------------------------------------------------------------------------------------
REFUSED = {
    "max_stepz": (3, "did you mean 'max_steps'"),
    "push_to_hub": (True, "hf-optim push"),
    "hub_model_id": ("other/x", "does not upload"),
    "hub_token": ("x", "does not upload"),
    "output_dir": ("/somewhere", "--output"),
    "logging_dir": ("/somewhere", "--output"),
    "run_name": ("x", "--output"),
    "report_to": ("wandb", "no service"),
    "trackio_space_id": ("x", "no service"),
    "deepspeed": ("/x.json", "torchrun"),
    "fsdp": ("full_shard", "torchrun"),
    "fsdp_config": ({}, "torchrun"),
    "accelerator_config": ({}, "torchrun"),
    "resume_from_checkpoint": ("/x", "--resume"),
    "torch_compile": (True, "OptimTrainer(args="),
    "debug": ("underflow_overflow", "OptimTrainer(args="),
    "do_eval": (True, "without evaluation"),
    "optim_args": ("x", "OptimTrainer(model, args="),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, "the schedule linear has no num_cycles"),
    "adam_beta2": (1, "below 1"),
    "max_steps": (1e30, "whole number from 1"),
    "dataloader_num_workers": (1e6, "whole number from 0 to 64"),
    "learning_rate": (float("nan"), "number from 0"),
    "weight_decay": (True, "number from 0"),
    "lr_scheduler_type": ("cosin", "did you mean 'cosine'"),
    "save_strategy": ("sideways", "one of no, steps, epoch"),
    "bf16": ("yes", "true or false"),
    "seed": (2**32, "whole number"),
    "save_steps": (1.5, "whole number of steps"),
    "gradient_accumulation_steps": (0, "whole number from 1"),
    "per_device_train_batch_size": ("8", "whole number from 1"),
}


@pytest.mark.parametrize(("key", "value", "message"), [(k, *v) for k, v in REFUSED.items()], ids=REFUSED)
def test_check_refuses_what_compress_refuses(key, value, message, tmp_path, capsys):
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"steps": [{"technique": "gmp"}], "training": {key: value}}).replace("NaN", '"nan"'))
    for command, status in (
        (["check", str(path)], 1),
        (["compress", "no-model", "--recipe", str(path), "--output", str(tmp_path / "o")], 2),
    ):
        assert main(command) == status
        line = capsys.readouterr().err
        assert message in line
        assert len(line.splitlines()) == 1


def test_every_allowed_argument_is_one_of_training_arguments(tmp_path):
    from transformers import TrainingArguments

    from hf_optim.training.arguments import training_arguments

    known = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(FIELDS) <= known
    training = {
        "learning_rate": "5e-4",
        "save_strategy": False,
        "max_steps": 3,
        "warmup_steps": 0.1,
        "logging_steps": 0.5,
    }
    recipe = OptimConfig.parse({"steps": ["gmp"], "training": training})
    assert recipe.training["learning_rate"] == 5e-4
    made = training_arguments(str(tmp_path), recipe.training)
    assert (made.max_steps, made.save_strategy.value) == (3, "no")
    assert OptimConfig.parse(recipe.to_dict()).training == recipe.training
