"""``--resume`` goes on if model, data, teacher, caches and output are named by other spellings of the same paths."""

from __future__ import annotations

import json
import os

import pytest
import torch
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

import hf_optim.training
from hf_optim.calibration.block_journal import BlockJournal
from hf_optim.calibration.streamed.output import StreamedOutput
from hf_optim.cli import main
from hf_optim.runs.record import Record

GPTQ = [{"technique": "gptq", "bits": 4, "group_size": 16}]
TRAINING = {"max_steps": 4, "per_device_train_batch_size": 2, "disable_tqdm": True, "save_steps": 1}


class Stop(Exception):
    """The process ends here."""


@pytest.fixture
def home(tmp_path):
    for name in ("model", "teacher"):
        tiny_llama(vocab_size=259).save_pretrained(tmp_path / name)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "teacher")
    picks = torch.randint(6, (8, 60), generator=torch.Generator().manual_seed(0)).tolist()
    words = ["the", "cat", "sat", "on", "a", "mat"]
    texts = [{"text": " ".join(words[w] for w in row)} for row in picks]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def command(home, spelled, steps, *options, training=None, **recipe):
    """Return the arguments of a command whose every path is written as ``spelled`` writes it."""
    written = [
        {key: spelled(value) if key in ("teacher", "cache") else value for key, value in s.items()} for s in steps
    ]
    content = {
        "steps": written,
        "calibration": {"dataset": spelled("data.jsonl"), "samples": 4, "seq_len": 32},
        **recipe,
    }
    content["training"] = training or {}
    (home / "recipe.json").write_text(json.dumps(content))
    return [
        "compress", spelled("model"), "--recipe", str(home / "recipe.json"), "--output", spelled("out"),
        "--device", "cpu", *(spelled(word) if word == "spill" else word for word in options),
    ]  # fmt: skip


def absolute(home):
    return lambda path: str(home / path)


def relative(home):
    (home / "link").symlink_to(home)
    return lambda path: f"link/./{path}" if path in ("model", "data.jsonl") else path


def test_a_blockwise_calibration(home, monkeypatch, capsys):
    saved, stock = [], BlockJournal.save

    def save(self, run, first, name):
        stock(self, run, first, name)
        saved.append(name)
        if len(saved) == 1:
            raise Stop

    monkeypatch.setattr(BlockJournal, "save", save)
    assert main(command(home, absolute(home), GPTQ)) == 2
    assert "Stop: " in capsys.readouterr().err
    monkeypatch.chdir(home)
    assert main([*command(home, relative(home), GPTQ), "--resume"]) == 0
    assert saved == ["model.layers.0", "model.layers.1"]
    assert Record.read(home / "out").stages[0]["blocks"] == 1


def test_a_streamed_calibration(home, monkeypatch, capsys):
    written, stock = [], StreamedOutput.write_block

    def write_block(self, run, number):
        names = stock(self, run, number)
        written.append(number)
        if len(written) == 1:
            raise Stop
        return names

    monkeypatch.setattr(StreamedOutput, "write_block", write_block)
    options = ("--driver", "streamed", "--spill", "spill")
    assert main(command(home, absolute(home), GPTQ, *options)) == 2
    assert "Stop: " in capsys.readouterr().err
    monkeypatch.chdir(home)
    assert main([*command(home, relative(home), GPTQ, *options), "--resume"]) == 0
    assert written == [0, 1]


@pytest.mark.slow
def test_a_training_with_teacher_and_cache(home, monkeypatch, capsys):
    done, stock = [], hf_optim.training.OptimTrainer.training_step

    def step(self, *args, **kwargs):
        if len(done) == 2:
            done.append("stopped")
            raise Stop
        done.append(self.state.global_step)
        return stock(self, *args, **kwargs)

    monkeypatch.setattr(hf_optim.training.OptimTrainer, "training_step", step)
    kd = {"technique": "logit_kd", "teacher": "teacher", "top_k": 4, "cache": "cache"}
    steps = [{"technique": "gmp", "sparsity": 0.5}, kd]
    assert main(command(home, absolute(home), steps, training=TRAINING)) == 2
    assert "Stop: " in capsys.readouterr().err
    monkeypatch.chdir(home)
    assert main([*command(home, relative(home), steps, training=TRAINING), "--resume"]) == 0
    assert done == [0, 1, "stopped", 2, 3]


def test_the_same_words_in_another_folder_are_other_paths(home, monkeypatch, capsys):
    monkeypatch.setattr(BlockJournal, "remove", lambda self: None)
    monkeypatch.chdir(home)
    steps = [{"technique": "magnitude"}, {"technique": "logit_kd", "teacher": "teacher"}]
    training = {**TRAINING, "max_steps": 1}
    assert main(command(home, lambda path: path, steps, training=training)) == 0
    other = home / "other"
    other.mkdir()
    monkeypatch.chdir(other)
    tiny_llama(vocab_size=259, seed=1).save_pretrained("teacher")
    tiny_tokenizer().save_pretrained("teacher")
    spelled = lambda path: path if path == "teacher" else os.path.join(home, path)  # noqa: E731
    assert main([*command(home, spelled, steps, training=training), "--resume"]) == 2
    assert "another recipe" in capsys.readouterr().err
