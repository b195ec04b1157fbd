"""What commands print while they work: one line on a terminal, plain lines in a pipe, nothing with --quiet."""

from __future__ import annotations

import json
import os
import re
import sys

import pytest
import torch
from terminal import bars_allowed, run_on_terminal, terminal
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

import hf_optim
from hf_optim.cli import COMMANDS, main

FOREIGN = (
    "Loading weights",
    "Writing model shards",
    "Compressing model",
    "Decompressing",
    "Applying quantization",
    "it/s",
)
TEXT = "the cat sat on a mat and saw what the dog had done to it " * 30


@pytest.fixture(autouse=True)
def as_started(monkeypatch):
    with bars_allowed(monkeypatch):
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a model, texts and recipes."""
    folder = tmp_path_factory.mktemp("progress")
    tiny_llama(vocab_size=259, num_hidden_layers=3).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": TEXT}) + "\n" for _ in range(8)))
    data = {"dataset": str(folder / "texts.jsonl"), "samples": 4, "seq_len": 32}
    training = {"max_steps": 3, "per_device_train_batch_size": 2, "learning_rate": 1e-3, "logging_steps": 1}
    recipes = {
        "gptq": [{"technique": "gptq", "bits": 4, "group_size": 16}],
        "rtn": [{"technique": "rtn", "bits": 4, "group_size": 16}],
        "gmp": [{"technique": "gmp"}],
        "magnitude": [{"technique": "magnitude", "sparsity": 0.5}],
    }
    for name, steps in recipes.items():
        recipe = {"steps": steps, "calibration": data, "training": training if name == "gmp" else {}}
        (folder / f"{name}.json").write_text(json.dumps(recipe))
    return folder


def compress(home, recipe, output, *options):
    paths = ["--recipe", home / f"{recipe}.json", "--output", home / output, "--device", "cpu"]
    return main([str(word) for word in ["compress", home / "model", *paths, *options]])


def require_one_line(seen):
    """No bar of another library, none below another one, and none left behind."""
    assert not [word for word in FOREIGN if word in seen.written]
    assert "\x1b[A" not in seen.written
    assert not [line for line in seen.screen if "elapsed" in line or "|" in line]


def test_compress_on_a_terminal_draws_one_line(home):
    with terminal() as seen:
        assert compress(home, "gptq", "on-terminal") == 0
    require_one_line(seen)
    kinds = {frame.split(" |")[0].split(",")[0] for frame in seen.frames}
    assert {f"calibrating: {i}/3 blocks" for i in range(3)} <= kinds
    assert any(kind.startswith("loading model: ") for kind in kinds)
    assert any(kind.startswith("saving: ") for kind in kinds)
    assert any("model.layers.1: gptq" in frame for frame in seen.frames)
    assert "step 1 (gptq) changed" in "\n".join(seen.screen)


@pytest.mark.parametrize(("recipe", "word"), [("rtn", "quantizing"), ("magnitude", "pruning")])
def test_steps_without_data_do_not_calibrate(home, recipe, word):
    with terminal() as seen:
        assert compress(home, recipe, f"{recipe}-out") == 0
    assert f"{word}: 1/3 blocks" in seen.written
    assert "calibrating" not in seen.written


def test_training_shows_the_steps_of_the_trainer(home):
    with terminal() as seen:
        assert compress(home, "gmp", "trained") == 0
    require_one_line(seen)
    # The clock may be drawing when a step ends: not every count is seen.
    assert re.search(r"training \[gmp\]: [1-3]/3", seen.written)
    assert [line for line in seen.screen if line.startswith("{'loss'")]


def test_a_pipe_gets_plain_lines(home, capsys):
    assert compress(home, "gptq", "piped") == 0
    printed = capsys.readouterr()
    assert "\r" not in printed.out + printed.err
    assert "\x1b" not in printed.out + printed.err
    assert not [word for word in FOREIGN if word in printed.err]
    stages = [line.split(": ")[0] for line in printed.err.splitlines() if line.endswith(" s")]
    assert stages == ["loading model", "calibrating", "saving"]
    assert printed.out.startswith("metric ")


def test_quiet_leaves_the_result_and_errors(home, capsys):
    assert compress(home, "gmp", "quiet", "--quiet") == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert printed.out.startswith("metric ")
    assert "loss" not in printed.out
    assert compress(home, "gptq", "quiet", "-q", "--seq-len", "4096") == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("hf-optim: ")
    assert printed.err.count("\n") == 1


def test_quiet_draws_nothing_on_a_terminal(home):
    with terminal() as seen:
        assert compress(home, "rtn", "quiet-terminal", "--quiet") == 0
    assert seen.frames == []


def test_json_is_the_whole_of_standard_output(home, capsys):
    assert compress(home, "gmp", "as-json", "--json") == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert set(found) == {"output", "measured", "coverage"}
    assert found["output"] == str(home / "as-json")
    (coverage,) = found["coverage"].values()
    assert coverage["share"] > 0.5
    assert found["measured"]["after"]["bytes_on_disk"] > 0
    assert "{'loss'" in printed.err  # the log of the Trainer is a note


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_quiet_and_json(name, capsys):
    with pytest.raises(SystemExit):
        main([name, "--help"])
    words = capsys.readouterr().out.split()
    assert "--quiet" in words
    assert "--json" in words


def test_python_draws_nothing_into_a_pipe(home, capsys):
    model = hf_optim.optimize(tiny_llama(num_hidden_layers=2), {"steps": [{"technique": "rtn", "bits": 4}]})
    model.save_pretrained(home / "from-python")
    capsys.readouterr()  # what torch or transformers may warn about
    again = type(model).from_pretrained(home / "from-python", optim_config="auto")
    printed = capsys.readouterr()
    assert "\r" not in printed.err
    assert not [word for word in FOREIGN if word in printed.err]
    assert torch.isfinite(again(torch.tensor([[1, 2]])).logits).all()


@pytest.mark.slow
def test_eval_shows_its_progress_in_the_line_of_compress(home):
    command = ["compress", home / "model", "--recipe", home / "rtn.json", "--output", home / "evaluated"]
    options = ["--eval", home / "texts.jsonl", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    status, seen = run_on_terminal([sys.executable, "-m", "hf_optim.cli", *map(str, command + options)], environment)
    assert status == 0, seen.written
    require_one_line(seen)
    for what in ("the original", "the result"):
        assert f"measuring {what}: evaluating: " in seen.written
    assert "comparing with the original: " in seen.written
