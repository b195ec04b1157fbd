"""Where ``hf-optim compress`` writes: the current directory, links and mount points, and folders for activations."""

from __future__ import annotations

import json
import os

import pytest
from safetensors.torch import load_file
from tiny_models import tiny_llama
from tiny_tokenizer import tiny_tokenizer

from hf_optim.checkpoints import atomic
from hf_optim.cli import main


@pytest.fixture
def home(tmp_path):
    tiny_llama(vocab_size=259).save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"text": "the cat sat on a mat " * 8} for _ in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def compress(home, output, *options, recipe="w8a8"):
    words = ["compress", home / "model", "--recipe", recipe, "--output", output, "--device", "cpu", *options]
    return main([str(word) for word in words])


def refusal(capsys, *arguments):
    assert compress(*arguments) == 2
    printed = capsys.readouterr()
    assert "loading" not in printed.out  # before the work
    (line,) = [line for line in printed.err.splitlines() if line.startswith("hf-optim: ")]
    return line


def test_the_current_directory_is_refused_before_the_work(home, monkeypatch, capsys):
    here = home / "here"
    here.mkdir()
    (here / "mine.txt").write_text("mine")
    monkeypatch.chdir(here)
    for output in (".", here, "../here", ".."):
        assert "current directory" in refusal(capsys, home, output), output
    assert os.getcwd() == str(here)
    assert os.listdir(".") == ["mine.txt"]


def test_a_link_stays_a_link(home):
    (home / "disk").mkdir()
    (home / "disk" / "notes.txt").write_text("mine")
    (home / "out").symlink_to(home / "disk")
    assert compress(home, home / "out") == 0
    assert (home / "out").is_symlink()
    assert os.readlink(home / "out") == str(home / "disk")
    assert load_file(home / "disk" / "model.safetensors")
    assert (home / "disk" / "notes.txt").read_text() == "mine"


def test_a_mount_point_is_refused_before_the_work(home, monkeypatch, capsys):
    (home / "disk").mkdir()
    (home / "link").symlink_to("disk")
    if hasattr(atomic, "_mount_points"):
        monkeypatch.setattr(atomic, "_mount_points", lambda: [home / "disk"])
    for output in (home / "disk", home / "link"):
        line = refusal(capsys, home, output)
        assert "mount point" in line
        assert "/NAME" in line
    assert not list((home / "disk").iterdir())


def test_a_new_folder_for_activations_is_made_and_those_of_killed_runs_are_removed(home):
    (home / "gptq.json").write_text(
        json.dumps(
            {
                "steps": [{"technique": "gptq", "group_size": 16}],
                "calibration": {"dataset": str(home / "data.jsonl"), "samples": 4, "seq_len": 16},
            }
        )
    )
    new, old = home / "new" / "spill", home / "old"
    (old / "activations-0a1b2c3d").mkdir(parents=True)
    (old / "activations-0a1b2c3d" / "hidden-00000.activations").write_bytes(b"x")
    (old / "mine.txt").write_text("mine")
    for number, spill in enumerate((new, old)):
        done = compress(
            home, home / f"out{number}", "--driver", "streamed", "--spill", spill, recipe=home / "gptq.json"
        )
        assert done == 0
        assert list(home.glob(f"out{number}/*.safetensors"))
    assert not new.exists()
    assert os.listdir(old) == ["mine.txt"]
