"""What ``check`` says a run costs: steps, tokens, checkpoints and bytes, from the recipe and the configuration."""

from __future__ import annotations

import json

import pytest
import torch
from tiny_models import tiny_llama, tiny_vit
from tiny_tokenizer import tiny_tokenizer
from torch import nn

from hf_optim.checkpoints.source import ModelSource
from hf_optim.cli.jobs import calibration_cost, training_cost
from hf_optim.cli.jobs.estimate import INTERPRETER, estimate
from hf_optim.cli.jobs.plan import Plan
from hf_optim.recipes.config import DataConfig, OptimConfig
from hf_optim.recipes.training_fields import FIELDS

PARAMETERS = sum(p.numel() for p in tiny_llama(vocab_size=259).parameters())


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=259).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def look(home, recipe, rows=None, training=None, **sections):
    steps = [{"technique": step} if isinstance(step, str) else step for step in recipe]
    parsed = OptimConfig.parse({"steps": steps, **sections})
    plan = Plan(ModelSource(str(home)), parsed, training, device="cpu")
    return estimate(plan, tiny_llama(vocab_size=259).to("meta"), rows)


def stage_of(*args, **kwargs):
    (stage,) = look(*args, **kwargs)["stages"]
    return stage


def test_memory_of_training_has_its_parts(home):
    found = look(home, ["gmp"])
    (stage,) = found["stages"]
    memory = stage["memory"]
    assert memory["model"] == memory["gradients"] == 4 * PARAMETERS
    assert memory["optimizer"] == 2 * memory["model"]  # AdamW is the default
    assert memory["teacher"] == 0
    assert memory["activations"] > 0
    assert 0 < memory["techniques"] < PARAMETERS  # a byte for each weight that is pruned
    everything = sum(memory.values())
    assert everything <= stage["device_bytes"] < 1.2 * everything
    assert found["host_bytes"] == INTERPRETER + stage["host_bytes"]
    assert found["device_bytes"] == stage["device_bytes"]


def test_a_teacher_is_held_too(home, tmp_path):
    with_self = stage_of(home, ["nm", "logit_kd"])["memory"]
    assert with_self["teacher"] == 4 * PARAMETERS
    tiny_llama(vocab_size=259, num_hidden_layers=4).save_pretrained(tmp_path)
    larger = stage_of(home, ["nm", {"technique": "logit_kd", "teacher": str(tmp_path)}])["memory"]
    assert larger["teacher"] > 1.4 * with_self["teacher"]
    assert larger["model"] == with_self["model"]


@pytest.mark.parametrize("name", FIELDS["optim"].names)
def test_every_optimizer_that_a_recipe_can_name_has_its_state(name):
    """Against the state of the optimizer itself, where it is installed."""
    layer = nn.Linear(300, 200)
    guessed = training_cost.OPTIMIZERS[name](list(layer.parameters()))
    made = {
        "adamw_torch": torch.optim.AdamW,
        "adamw_torch_fused": torch.optim.AdamW,
        "sgd": torch.optim.SGD,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }.get(name)
    if name == "adafactor":
        from transformers import Adafactor

        optimizer = Adafactor(layer.parameters())
    elif made is None:
        assert guessed > 0
        return
    else:
        optimizer = made(layer.parameters(), lr=1e-3)
    layer(torch.randn(2, 300)).sum().backward()
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    )
    assert guessed == held


@pytest.mark.parametrize(
    ("training", "rows", "steps"),
    [
        ({"max_steps": 70}, None, 70),
        ({}, None, None),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4}, 10, 6),
        ({"num_train_epochs": 2, "per_device_train_batch_size": 4, "dataloader_drop_last": True}, 10, 4),
        ({"num_train_epochs": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 3}, 13, 3),
        ({"per_device_train_batch_size": 8}, 8, 3),  # three epochs is the default
    ],
)
def test_steps_are_those_of_a_trainer(home, training, rows, steps):
    found = training_stage(home, training, rows)
    assert found["training_steps"] == steps
    batch = training.get("per_device_train_batch_size", 8) * training.get("gradient_accumulation_steps", 1)
    assert found["batch_size"] == batch
    assert found["training_tokens"] == (None if steps is None else steps * batch * 16)


def training_stage(home, training, rows):
    recipe = OptimConfig.parse(
        {"steps": [{"technique": "gmp"}], "training": training, "calibration": {"seq_len": 16, "samples": None}}
    )
    plan = Plan(ModelSource(str(home)), recipe, device="cpu")
    (stage,) = estimate(plan, tiny_llama(vocab_size=259).to("meta"), rows)["stages"]
    return stage


def test_steps_are_those_that_a_trainer_takes(home, tmp_path):
    """The count of the largest case, against ``transformers.Trainer`` itself."""
    from transformers import Trainer

    training = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    guessed = training_stage(home, training, 21)["training_steps"]
    arguments = training_cost.training_arguments(str(tmp_path), {**training, "use_cpu": True})
    rows = [{"input_ids": torch.zeros(4, dtype=torch.long), "labels": torch.zeros(4, dtype=torch.long)}] * 21
    trainer = Trainer(model=tiny_llama(), args=arguments, train_dataset=rows)
    assert trainer.train().global_step == guessed


@pytest.mark.parametrize(
    ("training", "written", "kept", "at_once"),
    [
        ({"max_steps": 100}, 5, 2, 3),
        ({"max_steps": 3}, 3, 2, 3),
        ({"max_steps": 100, "save_strategy": "no"}, 0, 0, 0),
        ({"max_steps": 100, "save_steps": 30, "save_total_limit": 4}, 4, 4, 4),
        ({"num_train_epochs": 1, "save_strategy": "epoch"}, 1, 1, 1),
        ({"save_steps": 30}, None, 2, 3),
    ],
)
def test_checkpoints_on_disk(home, training, written, kept, at_once):
    found = training_stage(home, training, None)["checkpoints"]
    assert (found["written"], found["kept"]) == (written, kept)
    assert found["disk_bytes"] == at_once * found["bytes"]
    assert found["bytes"] >= 3 * 4 * PARAMETERS  # the weights and two moments


def test_gradient_checkpointing_and_accumulation_are_considered(home):
    plain = training_stage(home, {"per_device_train_batch_size": 8}, None)["memory"]["activations"]
    assert training_stage(home, {"per_device_train_batch_size": 2}, None)["memory"]["activations"] < plain / 2
    less = training_stage(home, {"per_device_train_batch_size": 8, "gradient_checkpointing": True}, None)
    assert less["memory"]["activations"] < plain


def test_data_with_its_own_length_counts(home):
    data = DataConfig(dataset="random", seq_len=8, samples=None)
    assert stage_of(home, ["gmp"], training=data)["row_tokens"] == 8


@pytest.mark.parametrize(
    ("driver", "kind"), [("auto", "blockwise"), ("whole_model", "whole_model"), ("streamed", "streamed")]
)
def test_a_calibration_has_its_driver_and_its_memory(home, driver, kind):
    found = look(
        home, [{"technique": "gptq", "group_size": 16}], driver=driver, calibration={"samples": 8, "seq_len": 16}
    )
    (stage,) = found["stages"]
    assert stage["driver"] == kind
    assert stage["calibration_tokens"] == found["calibration_tokens"] == 128
    assert stage["activation_bytes"] == 128 * 32 * 4
    assert stage["forward_seconds"] > 0
    assert stage["host_bytes"] > stage["activation_bytes"]


def test_one_batch_is_in_a_block_at_a_time_however_much_data_there_is(home):
    recipe = OptimConfig.parse(
        {"steps": [{"technique": "gptq", "group_size": 16}], "calibration": {"samples": None, "seq_len": 16}}
    )
    plan = Plan(ModelSource(str(home)), recipe, device="cpu")
    few, many = (estimate(plan, tiny_llama(vocab_size=259).to("meta"), None, tokens) for tokens in (256, 256_000))
    kept = [found["stages"][0]["activation_bytes"] for found in (few, many)]
    assert kept == [256 * 32 * 4, 256_000 * 32 * 4]
    # Both lists of outputs, of a block and of the one before it, are in memory.
    assert many["required_bytes"] - few["required_bytes"] < 2.2 * (kept[1] - kept[0])


def test_images_and_steps_without_data(tmp_path):
    tiny_vit().save_pretrained(tmp_path)
    plan = Plan(ModelSource(str(tmp_path)), OptimConfig.parse("w4a16"), device="cpu")
    found = estimate(plan, tiny_vit().to("meta"))
    assert found["calibration_tokens"] == 0
    assert "as many examples as the data has" in found["readable"]["calibration"]
    plan = Plan(ModelSource(str(tmp_path)), OptimConfig.parse("w8a8"), device="cpu")
    assert "no data needed" in estimate(plan, tiny_vit().to("meta"))["readable"]["calibration"]


def test_stages_have_their_own_rows(home):
    found = look(home, ["gmp", {"technique": "gptq", "group_size": 16}], calibration={"samples": 8, "seq_len": 16})
    assert [stage["kind"] for stage in found["stages"]] == ["training", "calibration"]
    assert {"training memory (stage 1)", "calibration (stage 2)"} <= set(found["readable"])
    assert found["host_bytes"] == INTERPRETER + max(stage["host_bytes"] for stage in found["stages"])
    json.dumps(found)


def test_durations_are_rough():
    assert calibration_cost.duration(0.2) == "under a second"
    assert calibration_cost.duration(200) == "about 3 min"
    assert calibration_cost.duration(7300) == "about 2 h"
