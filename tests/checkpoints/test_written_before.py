"""Checkpoints, records and recipes written by an earlier state of the sources (commit 3cc8253) still work.

``tests/written_before`` holds tiny Llamas: two in compressed-tensors, two that carry their own code, one in a stock
architecture, a pruned one, and a ``Trainer`` checkpoint from the middle of its training. ``logits.safetensors`` holds
what each gave for ``IDS`` when it was written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import hf_optim
from hf_optim import OptimConfig
from hf_optim.cli import main
from hf_optim.runs.record import Record
from hf_optim.testing.models import tiny_llama

HOME = Path(__file__).parents[1] / "written_before"
IDS = torch.arange(12).reshape(1, 12) % 60 + 3
CHECKPOINTS = ("gptq-w4a16", "nm-rtn-w4a16", "gobo", "peg", "local", "gmp")


@pytest.fixture(scope="module")
def logits() -> dict[str, torch.Tensor]:
    return load_file(HOME / "logits.safetensors")


def given(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.filterwarnings("ignore::hf_optim.KernelWarning")  # codebooks have no kernel on a CPU
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "gmp"])
def test_checkpoints_load_with_the_logits_they_had(name, logits):
    stock = AutoModelForCausalLM.from_pretrained(HOME / name, trust_remote_code=True)
    torch.testing.assert_close(given(stock), logits[name], rtol=0, atol=1e-6)
    ours = AutoModelForCausalLM.from_pretrained(HOME / name, optim_config="auto", trust_remote_code=True)
    torch.testing.assert_close(given(ours), logits[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_records_are_read_their_recipes_parse_and_their_cards_render(name, tmp_path, capsys):
    home = shutil.copytree(HOME / name, tmp_path / name)
    record = Record.read(home)
    assert record.finished
    recipe = OptimConfig.parse(record.recipe)
    assert recipe.to_dict()["steps"] == record.recipe["steps"]
    recipe.check()
    before = (home / "README.md").read_text()
    assert main(["card", str(home)]) == 0
    after = (home / "README.md").read_text()
    if name in ("gobo", "peg"):  # a class with its own code was tagged as a model without a head
        before = before.replace("pipeline_tag: feature-extraction", "pipeline_tag: text-generation")
    assert before.split("---")[1] == after.split("---")[1]  # the front matter
    assert json.loads((home / "hf_optim.json").read_text()) == json.loads((HOME / name / "hf_optim.json").read_text())


def test_training_goes_on_from_a_checkpoint_to_the_same_weights(tmp_path):
    home = shutil.copytree(HOME / "gmp-checkpoint-2", tmp_path / "checkpoint-2")
    model = hf_optim.optimize(tiny_llama(), [{"technique": "gmp", "sparsity": 0.5, "begin": 0, "end": 4, "every": 1}])
    rows = [{"input_ids": IDS[0], "labels": IDS[0]} for _ in range(16)]
    arguments = TrainingArguments(
        str(tmp_path),
        max_steps=4,
        save_strategy="no",
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, callbacks=hf_optim.callbacks(model))
    trainer.train(resume_from_checkpoint=str(home))
    expected = load_file(HOME / "gmp" / "model.safetensors")
    for name, value in model.state_dict().items():
        if name in expected:
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
    assert hf_optim.run_of(model).finished
