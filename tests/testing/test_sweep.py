"""The sweep over the architectures of transformers: what it checks, and that it notices what is wrong."""

from __future__ import annotations

import json
import os
import signal
import sys
import time

import pytest
import torch
import transformers

from hf_optim.testing.sweep import __main__, checks, pool, worker
from hf_optim.testing.sweep.architectures import Architecture, architectures
from hf_optim.testing.sweep.configurations import shrink, tiny_config
from hf_optim.testing.sweep.inputs import random_inputs
from hf_optim.testing.sweep.recipes import RECIPES
from hf_optim.testing.sweep.table import shares, write_table

CLASSES = ("MistralForCausalLM", "ViTForImageClassification", "WhisperForConditionalGeneration")


@pytest.mark.many
@pytest.mark.parametrize("name", CLASSES)
def test_text_vision_and_speech_pass(name, tmp_path, stock):
    result = checks.check_class(name, tmp_path, stock, ["w4a16"])
    assert result.stock == ""
    assert result.recipes == {"w4a16": ("pass", "")}
    assert 0 < result.parameters < 1_000_000


def test_a_changed_checkpoint_fails(tmp_path, stock, monkeypatch):
    from hf_optim.checkpoints import saving

    former = saving.save

    def change(run, *args, **kwargs):
        with torch.no_grad():
            run.model.get_input_embeddings().weight.add_(1.0)
        former(run, *args, **kwargs)

    monkeypatch.setattr(saving, "save", change)
    result = checks.check_class("MistralForCausalLM", tmp_path, stock, ["magnitude"])
    outcome, reason = result.recipes["magnitude"]
    assert outcome == "FAIL"
    assert reason.startswith("stock reload: Unequal: the reloaded model differs by")


def test_a_refusal_and_a_raw_error_are_told_apart(tmp_path, stock, monkeypatch):
    model = checks.build("MistralForCausalLM")
    model.save_pretrained(tmp_path / "model")
    batches = [random_inputs(model, 0)]

    def outcome(recipe):
        monkeypatch.setitem(RECIPES, "tried", recipe)
        return checks.check_recipe(type(model), tmp_path / "model", "tried", batches, tmp_path / "out", stock)

    refused = outcome([{"technique": "structured", "targets": "no such module"}])
    assert refused[0] == "refused"
    assert refused[1].startswith(("ModelError", "RecipeError"))
    monkeypatch.setattr(checks.hf_optim, "restore", lambda model: 1 / 0)
    assert outcome(RECIPES["magnitude"])[0] == "FAIL"


def test_configurations_keep_every_kind_of_layer_and_valid_ids():
    kinds = ["linear_attention"] * 5 + ["full_attention"]
    small = shrink({"num_hidden_layers": 12, "layer_types": kinds * 2, "eos_token_id": 90_000, "vocab_size": 100_000})
    assert small["layer_types"] == ["linear_attention", "full_attention"]
    assert small["num_hidden_layers"] == 2
    assert 0 < small["eos_token_id"] < small["vocab_size"] < 1000
    three = shrink({"num_hidden_layers": 9, "layer_types": ["a", "b", "c"] * 3})
    assert three["num_hidden_layers"] == len(three["layer_types"]) == 3


def test_most_classes_have_a_tiny_configuration():
    names = sorted({row.name for row in architectures()})
    assert len(names) > 400
    for name in names[::40]:
        config = tiny_config(getattr(transformers, name).config_class, name)
        assert getattr(config.get_text_config(), "vocab_size", None) in (None, *range(20_000))


def test_the_command_resumes(tmp_path, monkeypatch, capsys):
    asked = []

    def sweep(jobs, workers, seconds):
        asked.append([(job["name"], job["recipes"]) for job in jobs])
        for job in jobs:
            done = {recipe: ["FAIL" if recipe == "gptq" else "pass", ""] for recipe in job["recipes"]}
            yield {"name": job["name"], "stock": "", "recipes": done, "parameters": 1, "seconds": 0.1}

    monkeypatch.setattr(pool, "sweep", sweep)
    results, page = tmp_path / "results.json", tmp_path / "page.md"

    def command(*args):
        monkeypatch.setattr(sys, "argv", ["sweep", "--results", str(results), "--out", str(page), *args])
        return __main__.main()

    rest = [row.name for row in architectures() if row.name not in CLASSES]
    passed = {"stock": "", "recipes": dict.fromkeys(RECIPES, ("pass", ""))}
    results.write_text(json.dumps(dict.fromkeys(rest, passed)))
    assert command("--recipes", "w4a16") == 0
    assert sorted(asked[-1]) == sorted((name, ["w4a16"]) for name in CLASSES)
    assert command("--recipes", "w4a16", "gptq") == 1
    assert sorted(asked[-1]) == sorted((name, ["gptq"]) for name in CLASSES)
    assert command("--recipes", "gptq", "--again") == 1
    assert sorted(asked[-1]) == sorted((name, ["gptq"]) for name in CLASSES)
    assert command("--only", "^ViTForImage") == 1
    assert asked[-1] == [("ViTForImageClassification", list(RECIPES))]
    assert "| ViTForImageClassification | + | + | FAIL | + | + |" in page.read_text()
    assert "ViTForImageClassification {'gptq': ['FAIL', '']} 0.1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("check", "sound"),
    [
        (lambda *args: checks.Result(parameters=7), True),
        (lambda *args: time.sleep(60), False),
        (lambda *args: os.kill(os.getpid(), signal.SIGKILL), False),
        (lambda *args: sys.exit(0), False),
    ],
    ids=["a result", "a hang", "a crash", "an exit"],
)
def test_a_class_that_hangs_or_crashes_costs_one_process(monkeypatch, check, sound):
    monkeypatch.setattr(checks, "check_class", check)
    answer, ended = worker._in_child({"name": "X", "recipes": ["nm"]}, None, 2.0)
    assert ended is sound
    assert (answer or {}).get("parameters") == (7 if sound else None)


def test_the_table_gives_the_shares_honestly(tmp_path):
    rows = [Architecture("CausalLM", name) for name in "ABCD"]
    passed = dict.fromkeys(RECIPES, ("pass", ""))
    results = {
        "A": {"stock": "", "recipes": passed},
        "B": {"stock": "", "recipes": {**passed, "gptq": ("refused", "ModelError: a | b /tmp/x/y/out is <odd>")}},
        "C": {"stock": "", "recipes": {**passed, "nm": ("FAIL", "saving: KeyError: 'x'")}},
        "D": {"stock": "ImportError: timm", "recipes": {}},
    }
    text = shares(rows, results)
    assert "4 classes, of which transformers alone builds, runs, saves and reloads 3" in text
    assert "| gptq | 2 (66.7%) | 1 (33.3%) | 0 (0.0%) | 100.0% |" in text
    assert "| all five | 1 (33.3%) | 1 (33.3%) | 1 (33.3%) | 66.7% |" in text
    write_table(tmp_path / "page.md", rows, results)
    page = (tmp_path / "page.md").read_text()
    assert "- `C`: nm: saving: KeyError: 'x'" in page
    assert "| D | | | | | | stock cannot: ImportError: timm |" in page
    assert r"ModelError: a \| b out is &lt;odd>" in page
