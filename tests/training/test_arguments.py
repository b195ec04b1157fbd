"""Training arguments are tried before any work, and what a Trainer refuses is an error of the recipe."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_optim import DataError, OptimConfig, RecipeError, optimize
from hf_optim.cli import main
from hf_optim.recipes.config import DataConfig
from hf_optim.recipes.training_fields import FIELDS, parse_training
from hf_optim.testing.models import tiny_llama
from hf_optim.training.arguments import require_trainable
from hf_optim.training.fit import train_stage

LATE = {
    "an optimizer whose package is missing": {"optim": "adamw_bnb_8bit"},
    "another one": {"optim": "stable_adamw"},
    "liger kernels that are not installed": {"use_liger_kernel": True},
    "bfloat16 on a machine without it": {"bf16": True, "use_cpu": False},
    "a precision of newer GPUs": {"tf32": True},
}
HERE = {
    "an optimizer whose package is missing": "bitsandbytes",
    "another one": "optimi",
    "liger kernels that are not installed": "liger_kernel",
}


@pytest.mark.parametrize("what", LATE)
def test_what_a_trainer_refuses_is_refused_before_work(what, tmp_path, capsys):
    import importlib.util

    if torch.cuda.is_available() and what not in HERE:
        pytest.skip("this machine has it")
    if what in HERE and importlib.util.find_spec(HERE[what]):
        pytest.skip("the package is installed")
    with pytest.raises(RecipeError, match=r"^training: "):
        require_trainable(parse_training(LATE[what]))
    recipe = tmp_path / "r.json"
    import json

    recipe.write_text(json.dumps({"steps": ["gmp"], "training": {"max_steps": 1, **LATE[what]}}))
    tiny_llama().save_pretrained(tmp_path / "model")
    (tmp_path / "data.jsonl").write_text('{"text": "a"}\n')
    command = ["compress", str(tmp_path / "model"), "--recipe", str(recipe), "--output", str(tmp_path / "out")]
    assert main([*command, "--train", str(tmp_path / "data.jsonl")]) == 2
    assert "hf-optim: training: " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SCHEDULES = {
    "cosine_with_min_lr": {"min_lr": 1e-6},
    "warmup_stable_decay": {"num_decay_steps": 5},
    "polynomial": {"power": 2.0},
    "cosine_with_restarts": {"num_cycles": 2},
    "cosine": {"num_cycles": 0.5},
    "inverse_sqrt": {"timescale": 5},
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_takes_its_arguments(name):
    training = {"lr_scheduler_type": name, "lr_scheduler_kwargs": SCHEDULES[name], "learning_rate": 1e-3}
    require_trainable(parse_training({**training, "use_cpu": True}))


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"lr_scheduler_kwargs": {"num_cycles": 2}}, "the schedule linear has no num_cycles"),
        ({"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"min_lr": 2}}, "the schedule cosine has no min_lr"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "needs one of min_lr and min_lr_rate"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "needs num_decay_steps"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 0}, "lr_end .* must be below learning_rate"),
        ({"lr_scheduler_kwargs": {"steps": 2}}, "has only num_cycles"),
        ({"lr_scheduler_kwargs": "x"}, "must be a mapping"),
        ({"adam_beta1": 1}, "must be below 1"),
        ({"dataloader_persistent_workers": True}, "needs dataloader_num_workers"),
    ],
)
def test_arguments_that_exclude_each_other(training, message):
    with pytest.raises(RecipeError, match=message):
        parse_training(training)


def test_trying_leaves_the_random_state():
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    require_trainable({"seed": 5, "full_determinism": True, "use_cpu": True})
    assert random.getstate() == before[0]
    assert (np.random.get_state()[1] == before[1]).all()
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not torch.are_deterministic_algorithms_enabled()


def test_random_data_cannot_train_steps_that_need_labels(tmp_path, capsys):
    model = optimize(tiny_llama(), [{"technique": "gmp"}])
    with pytest.raises(DataError, match="trains on labels, which random data has none of"):
        train_stage(model, None, DataConfig(dataset="random", samples=2, seq_len=4), {"max_steps": 1, "use_cpu": True})
    tiny_llama().save_pretrained(tmp_path / "model")
    command = ["compress", str(tmp_path / "model"), "--recipe", "gmp", "--output", str(tmp_path / "out")]
    assert main([*command, "--train", "random", "--device", "cpu"]) == 2
    assert "trains on labels" in capsys.readouterr().err


def test_the_documentation_lists_the_arguments():
    from conftest import ROOT

    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert [name for name in FIELDS if f"`{name}`" not in text] == []
    assert OptimConfig.parse({"steps": ["gmp"], "training": {"max_steps": 1}}).training == {"max_steps": 1}
